"""The contract between `pipeline` and `trainer`: names, rows, atomic commit, offsets."""
