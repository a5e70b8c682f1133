"""`python -m pipeline`, for launchers that want a module: `torchrun -m pipeline generate`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
