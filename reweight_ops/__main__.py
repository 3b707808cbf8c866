"""``python -m reweight_ops`` is the command ``reweight-ops``."""

from .cli import main

if __name__ == "__main__":
    main()
