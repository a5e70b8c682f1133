"""`python -m trainer`, for launchers that want a module: `torchrun -m trainer pretrain`."""

from trainer.cli import main

if __name__ == "__main__":
    main()
