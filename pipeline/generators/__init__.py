"""What makes synthetic images. Adding a generator: one file with a class of `base.Generator`, one line here."""

GENERATORS: dict[str, str] = {
    "sd-variations": "pipeline.generators.sd_variations:SDVariations",
    "image-pipeline": "pipeline.generators.image_pipelines:ImagePipeline",
    "unconditional": "pipeline.generators.unconditional:Unconditional",
}
