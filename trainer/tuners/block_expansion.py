"""Block Expansion as a PEFT tuner: copies of some blocks, each the identity at the start, trained beside a frozen rest.

Bafghi et al., "Parameter Efficient Fine-tuning of Self-supervised ViTs without Catastrophic Forgetting"
(arXiv:2404.17245); the idea for language models is LLaMA Pro (arXiv:2401.02415). After importing this module,
`peft.get_peft_model`, `PeftModel.from_pretrained` and the rest of PEFT know `BlockExpansionConfig`.

A block that is followed by a copy is replaced, under its own name, by a layer that runs it and then the copy: no other
block changes its name or number, so that intermediate features, gradient checkpointing and layer-wise learning rates
work as before, and without the copies the network is exactly the original.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, cast

import peft.mapping
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from manifests.errors import UsageError
from trainer.tuners.expandable import expandable_blocks, silence
from trainer.tuners.peft_tuner import PeftTuner
from trainer.tuners.spec import TunerSpec

PEFT_TYPE = "BLOCK_EXPANSION"


@dataclass
class BlockExpansionConfig(PeftConfig):
    """`num_new_blocks` copies, spread evenly over the depth; `positions` (from 0) names the copied blocks instead.

    P copies in depth D follow blocks D*(j+1)//P - 1: every third of twelve for P=4. A single copy follows the last
    block but one, as in the paper. `target_modules` is filled in with the names of those blocks.
    """

    num_new_blocks: int = field(default=3, metadata={"help": "Number of copies."})
    positions: list[int] | None = field(default=None, metadata={"help": "Numbers of the copied blocks, from 0."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Names of the copied blocks."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = cast(Any, PEFT_TYPE)


def new_block_positions(depth: int, count: int) -> list[int]:
    """Numbers, from 0, of the blocks that are followed by a copy; raises `UsageError` unless 1 <= count <= depth."""
    if not 1 <= count <= depth:
        raise UsageError(f"block expansion of {depth} blocks can add 1 to {depth} copies, and {count} were asked for")
    if count == 1:
        return [max(0, depth - 2)]  # the paper's split of 11 for a depth of 12
    return [depth * (number + 1) // count - 1 for number in range(count)]


class BlockExpansionLayer(nn.Module, BaseTunerLayer):
    """A block, and after it the copies of the active adapters."""

    adapter_layer_names = ("block_expansion_blocks",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, inference_mode: bool = False) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.block_expansion_blocks = nn.ModuleDict()
        self.merged_adapters = []  # the class's own list would be shared by all layers
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, inference_mode)

    def update_layer(self, adapter_name: str, inference_mode: bool = False) -> None:
        """One more copy, the identity."""
        block = copy.deepcopy(self.base_layer)
        silence(block)
        self.block_expansion_blocks[adapter_name] = block
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens [N, L, D] to tokens; other arguments (masks, rotary embeddings) go to every block."""
        x = self.base_layer(x, *args, **kwargs)
        if not self.disable_adapters:
            for name in self.active_adapters:
                if name in self.block_expansion_blocks:
                    x = self.block_expansion_blocks[name](x, *args, **kwargs)
        return x


class BlockExpansionModel(BaseTuner):
    """What PEFT calls a tuner: finds the blocks and wraps them."""

    prefix = "block_expansion_"
    tuner_layer_cls = BlockExpansionLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  PEFT's own attribute

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        blocks = expandable_blocks(self.model)
        if peft_config.target_modules is None:
            positions = peft_config.positions or new_block_positions(len(blocks), peft_config.num_new_blocks)
            if any(not 0 <= position < len(blocks) for position in positions):
                raise UsageError(f"block expansion at positions {positions}: there are blocks 0 to {len(blocks) - 1}")
            names = list(blocks)
            peft_config.target_modules = [names[position] for position in sorted(set(positions))]
            peft_config.num_new_blocks = len(peft_config.target_modules)
        if unknown := [name for name in peft_config.target_modules if name not in blocks]:
            raise UsageError(
                f"block expansion of {', '.join(unknown)}: {type(self.model).__name__} has the blocks "
                f"{', '.join(blocks)}; an adapter fits encoders of the depth and names that it was trained in"
            )
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config.target_modules  # PEFT's own also takes the ends of names: a teacher's blocks, say

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BlockExpansionLayer):
            target.update_layer(adapter_name, peft_config.inference_mode)
            return
        layer = BlockExpansionLayer(target, adapter_name, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own copies `weight`, which a block does not have

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own looks at the end of the key only, and copies lie deeper.
        marker = f".{BlockExpansionLayer.adapter_layer_names[0]}."
        return key.replace(f"{marker}{adapter_name}.", marker)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Copies keep the type of their block: PEFT's own makes them float32, which meets bfloat16 in a product."""

    def _check_merge_allowed(self) -> None:
        raise UsageError(
            "new blocks cannot be merged into the old ones: `trainer export` writes a plain, deeper model "
            "(`BlockExpansion.merged`)"
        )


def register() -> None:
    """Make PEFT know Block Expansion; harmless when it does.

    `peft.utils.register_peft_method` takes only names of PEFT's own enum, so that its dicts are filled here.
    """
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[cast(Any, PEFT_TYPE)] = BlockExpansionConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[cast(Any, PEFT_TYPE)] = BlockExpansionModel
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[cast(Any, PEFT_TYPE)] = BlockExpansionModel.prefix


register()


class BlockExpansion(PeftTuner):
    """`size` new blocks; by default a quarter of the depth, at least one."""

    def _resolve(self, spec: TunerSpec) -> TunerSpec:
        depth = len(expandable_blocks(self.encoder))
        size = spec.size or max(1, depth // 4)
        new_block_positions(depth, size)
        return replace(spec, size=size)

    def _peft_config(self) -> PeftConfig:
        assert self.spec.size is not None
        return BlockExpansionConfig(num_new_blocks=self.spec.size)

    def merged(self) -> tuple[nn.Module, dict[str, Any]] | None:
        plain: Any = copy.deepcopy(self.encoder)
        blocks = flattened(plain)
        if blocks is None:
            return None
        plain.blocks = type(plain.blocks)(*blocks) if isinstance(plain.blocks, nn.Sequential) else nn.ModuleList(blocks)
        plain.feature_info = [{**plain.feature_info[0], "module": f"blocks.{number}"} for number in range(len(blocks))]
        del plain.peft_config
        return plain.requires_grad_(True).eval(), {"depth": len(blocks)}


def flattened(encoder: Any) -> list[nn.Module] | None:
    """Old and new blocks in the order in which they run, None if a plain model's blocks also depend on their number."""
    if getattr(encoder, "rope_mixed", False):  # learned rotary frequencies, one set for every block
        return None
    blocks: list[nn.Module] = []
    for block in encoder.blocks:
        blocks.append(getattr(block, "base_layer", block))
        if isinstance(block, BlockExpansionLayer):
            copies = block.block_expansion_blocks
            blocks += [copies[name] for name in block.active_adapters if name in copies]
    return None if any(hasattr(getattr(block, "attn", None), "lambda_init") for block in blocks) else blocks
