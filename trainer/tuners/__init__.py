"""Tuners by name: ways to adapt a pre-trained encoder. PEFT's other methods go by PEFT's names (`peft_methods`)."""

TUNERS: dict[str, str] = {
    "full": "trainer.tuners.partial:Full",
    "linear": "trainer.tuners.partial:Linear",
    "last-blocks": "trainer.tuners.partial:LastBlocks",
    "lora": "trainer.tuners.lora:LoRA",
    "block-expansion": "trainer.tuners.block_expansion:BlockExpansion",
}

OTHERS = "trainer.tuners.peft_methods:PeftMethod"
