"""Stage one of diffmix: real images to committed, verified, resumable pair shards."""
