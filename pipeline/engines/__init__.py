"""Who hands out shards. Adding an engine: one file with a class of `base.Engine`, one line here."""

ENGINES: dict[str, str] = {
    "local": "pipeline.engines.local:LocalEngine",
    "ranks": "pipeline.engines.ranks:RanksEngine",
}
