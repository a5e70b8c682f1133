"""Self-supervised methods by name: one file, one line here, one recipe."""

METHODS: dict[str, str] = {
    "simclr": "trainer.methods.simclr:SimCLR",
    "barlow-twins": "trainer.methods.barlow_twins:BarlowTwins",
    "dino": "trainer.methods.dino:DINO",
    "swav": "trainer.methods.swav:SwAV",
    "mae": "trainer.methods.mae:MAE",
    "mixed-ae": "trainer.methods.mixed_ae:MixedAE",
    "byol": "trainer.methods.byol:BYOL",
    "moco-v3": "trainer.methods.moco_v3:MoCoV3",
}
