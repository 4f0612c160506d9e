"""`python -m spo_train` is `spo-train`."""

from spo_train.cli import main

if __name__ == "__main__":
    main()
