"""Where real images come from. Adding a source: one file with a class of `base.Source`, one line here."""

SOURCES: dict[str, str] = {
    "folder": "pipeline.sources.folder:FolderSource",
    "tars": "pipeline.sources.tars:TarSource",
    "tables": "pipeline.sources.tables:TableSource",
    "pairs": "pipeline.sources.pairs:PairSource",
    "digits": "pipeline.sources.digits:DigitsSource",
}
