"""`python -m zs_offload_aio bench | tune | info`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
