"""``python -m elle_mp`` is the same program as ``elle-mp``."""

from elle_mp.cli.main import main

if __name__ == "__main__":
    main()
