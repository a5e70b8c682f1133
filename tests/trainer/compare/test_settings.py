"""Settings of a comparison: one budget, known keys, flags that win."""

import pytest
import yaml

from manifests.errors import UsageError
from trainer.compare.settings import Request, resolve


def resolved(folder, flags=None, **sections):
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"about": "a test", **sections}))
    return resolve(Request(recipe=str(path), flags=flags or {}))


def test_the_shipped_recipe_resolves():
    config = resolve(Request(recipe="digits"))
    assert list(config.arms) == ["simclr-real", "simclr-diffmix", "dino-real", "dino-diffmix"]
    assert (config.budget.max_steps, config.budget.minutes, config.test) == (300, None, "digits")


def test_no_budget_and_two_are_refused():
    with pytest.raises(UsageError, match=r"none was given: --max-steps N .* or --minutes M"):
        resolve(Request())
    with pytest.raises(UsageError, match="both were given"):
        resolve(Request(flags={"budget": {"max_steps": 3, "minutes": 2}}))


def test_a_budget_of_the_other_kind_replaces_the_recipes(tmp_path):
    config = resolved(tmp_path, {"budget": {"minutes": 2}}, budget={"max_steps": 9}, seeds=3)
    assert (config.budget.minutes, config.budget.max_steps) == (2, None)
    assert list(config.all_seeds) == [0, 1, 2]
    assert list(resolved(tmp_path, {"seeds": 2, "seed": 5, "budget": {"max_steps": 1}}).all_seeds) == [5, 6]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"budgets": {"max_steps": 1}}, "unknown key 'budgets'; did you mean 'budget'"),
        ({"budget": {"max_step": 1}}, "unknown key 'budget.max_step'; did you mean 'budget.max_steps'"),
        ({"budget": {"max_steps": 0}}, "budget.max_steps is 0"),
        ({"budget": {"minutes": 0}}, "budget.minutes is 0"),
        ({"budget": {"max_steps": 1}, "seeds": 0}, "seeds is 0"),
        ({"budget": {"max_steps": 1}, "evaluation": {"bank": 1}}, "evaluation.bank is 1"),
        ({"budget": {"max_steps": 1}, "arms": {"a": None}}, "arms.a is None"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, sections, said):
    with pytest.raises(UsageError, match=said):
        resolved(tmp_path, **sections)


def test_arms_come_from_one_place(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("budget: {max_steps: 1}\narms: {a: {recipe: simclr-digits}}\n")
    with pytest.raises(UsageError, match="leave out --method and --mix"):
        resolve(Request(recipe=str(path), methods=("simclr",)))


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        resolve(Request(recipe="digit"))
