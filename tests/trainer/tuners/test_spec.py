"""What `--peft` may say."""

import subprocess
import sys

import pytest

from manifests.errors import UsageError
from trainer.tuners.spec import TunerSpec, parse, peft_names


@pytest.mark.parametrize(
    ("text", "name", "size"),
    [
        ("full", "full", None),
        ("linear", "linear", None),
        ("last-blocks", "last-blocks", 3),
        ("last-blocks:2", "last-blocks", 2),
        ("lora", "lora", 8),
        ("lora:16", "lora", 16),
        ("block-expansion", "block-expansion", None),
        ("block-expansion:4", "block-expansion", 4),
        ("dora", "dora", 8),
        ("ia3", "ia3", None),
        ("loha:2", "loha", 2),
        ("LN_TUNING", "ln-tuning", None),
    ],
)
def test_names_and_sizes(text, name, size):
    assert parse(text) == TunerSpec(text=text, name=name, size=size)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lorra", "did you mean 'lora'"),
        ("block_expansoin:3", "did you mean 'block-expansion'"),
        ("full:3", "takes no size"),
        ("linear:1", "takes no size"),
        ("lora:0", "whole number from 1"),
        ("lora:", "whole number from 1"),
        ("lora:-1", "whole number from 1"),
        ("lora:2.5", "whole number from 1"),
        ("lora:²", "whole number from 1"),
        ("", "unknown tuner"),
    ],
)
def test_what_it_may_not_say(text, said):
    with pytest.raises(UsageError, match=said):
        parse(text)


def test_pefts_names_are_its_own():
    from peft import PeftType

    names = {kind.value.lower().replace("_", "-") for kind in PeftType}
    assert set(peft_names()) == names - {"lora"} | {"dora"}


def test_parsing_imports_neither_torch_nor_peft():
    code = (
        "import sys; from trainer.tuners.spec import parse; parse('ia3'); "
        "assert not {'torch', 'peft', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
