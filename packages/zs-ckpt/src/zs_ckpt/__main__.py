"""`python -m zs_ckpt`: the same as `zs ckpt`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
