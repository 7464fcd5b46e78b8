"""`python -m vit_train` is `vit-train`."""

from vit_train.cli.train import main

if __name__ == "__main__":
    main()
