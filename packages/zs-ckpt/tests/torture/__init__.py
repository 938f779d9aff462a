"""What the kill, lost-write and fault tests share; `drive.py` is the program that they and `nox -s torture` start."""
