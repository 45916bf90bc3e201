from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveInt

from pipeline import config, stages
from pipeline.config import Config
from pipeline.errors import ConfigError
from tests.conftest import ROOT


class Fast(Config):
    kind: Literal["fast"]
    speed: PositiveInt


class Slow(Config):
    kind: Literal["slow"]
    patience: float = 1.0


class Inner(Config):
    learning_rate: float = 1e-4
    precision: Literal["fp32", "bf16"] = "fp32"


class Outer(Config):
    steps: PositiveInt
    inner: Inner = Inner()
    mode: Annotated[Fast | Slow, Field(discriminator="kind")] = Slow(kind="slow")


def written(tmp_path: Path, text: str, name: str = "c.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_overrides_win_over_the_file_and_numbers_in_exponent_form_are_numbers(tmp_path):
    path = written(tmp_path, "steps: 3\ninner: {learning_rate: 1e-4}\n")
    cfg = config.load(Outer, path, ["inner.learning_rate=3e-4", "mode={kind: fast, speed: 2}"])
    assert cfg == Outer(steps=3, inner=Inner(learning_rate=3e-4), mode=Fast(kind="fast", speed=2))


@pytest.mark.parametrize(
    ("word", "told"),
    [("steps=2024-31-12", "steps: input should be a valid integer"), ("inner=[2024-01-01]", "inner: ")],
)
def test_dates_are_values_like_others(tmp_path, word, told):
    with pytest.raises(ConfigError, match=told):
        config.load(Outer, written(tmp_path, "steps: 3\n"), [word])


def test_all_mistakes_are_told_at_once_with_the_nearest_name(tmp_path):
    path = written(tmp_path, "steps: 0\ninner: {learning_rat: 1, precision: no}\nmode: {kind: slow, patiense: 1}\n")
    with pytest.raises(ConfigError) as error:
        config.load(Outer, path, ["inner.learnin_rate=2", "nonsense"])
    told = str(error.value)
    assert "6 problem(s)" in told
    assert "steps: input should be greater than 0, got 0" in told
    assert "inner.learning_rat: unknown key; did you mean 'learning_rate'?" in told
    assert "quote it" in told
    assert "mode.patiense: unknown key; did you mean 'patience'?" in told
    assert "'nonsense': expected key=value" in told


def test_a_key_that_stands_twice_is_a_mistake(tmp_path):
    with pytest.raises(ConfigError, match="'steps' appears twice"):
        config.load(Outer, written(tmp_path, "steps: 1\nsteps: 2\n"))


class Named(Config):
    codecs: dict[str, str]


def test_a_mapping_is_merged_unless_an_empty_override_went_before(tmp_path):
    path = written(tmp_path, "codecs: {a: runs/a, b: runs/b}\n")
    assert config.load(Named, path, ["codecs={c: runs/c}"]).codecs.keys() == {"a", "b", "c"}
    for empty in ("codecs=", "codecs={}"):
        assert config.load(Named, path, [empty, "codecs={c: runs/c}"]).codecs == {"c": "runs/c"}


@pytest.mark.parametrize("files", [["a"], ["a", "b"], ["first", "a", "b"]], ids=len)
def test_a_file_that_extends_itself_in_the_end_is_one_clear_mistake(tmp_path, files):
    """The last one extends one before it, under another spelling."""
    for name, base in zip(files, [*files[1:], files[-2:][0]], strict=True):
        written(tmp_path, f"extends: ./../{tmp_path.name}/{base}.yaml\n", f"{name}.yaml")
    with pytest.raises(ConfigError, match=r"`extends:` forms a cycle, .*a\.yaml -> ") as error:
        config.load(Outer, tmp_path / f"{files[0]}.yaml")
    assert "\n" not in str(error.value)


def test_extends_merges_sections_but_not_sections_of_another_kind(tmp_path):
    written(tmp_path, "steps: 1\ninner: {learning_rate: 5}\nmode: {kind: slow, patience: 9}\n", "base.yaml")
    path = written(tmp_path, "extends: base.yaml\ninner: {precision: bf16}\nmode: {kind: fast, speed: 1}\n")
    cfg = config.load(Outer, path)
    assert cfg.inner == Inner(learning_rate=5, precision="bf16")
    assert cfg.mode == Fast(kind="fast", speed=1)
    cfg = config.load(Outer, tmp_path / "base.yaml", ["mode={kind: fast, speed: 1}"])
    assert cfg.mode == Fast(kind="fast", speed=1)


def test_a_config_that_cannot_be_read_is_one_clear_mistake(tmp_path):
    for name in ("x" * 300, "file/c.yaml"):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(ConfigError, match="cannot be read"):
            config.load(Outer, tmp_path / name)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [", "\x00", "steps: 2024-31-12"])
def test_what_is_no_mapping_is_one_clear_mistake(tmp_path, text):
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        config.load(Outer, written(tmp_path, text))


def test_flatten_and_differences_name_dotted_keys():
    one, two = Outer(steps=1), Outer(steps=2, inner=Inner(precision="bf16"))
    assert config.flatten(one)["inner.learning_rate"] == 1e-4
    assert config.differences(config.flatten(two), config.flatten(one)) == [
        "steps: 1 there, 2 now",
        "inner.precision: fp32 there, bf16 now",
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_config_loads(path):
    if path.parent.name == "launch":
        return  # read by accelerate, see test_distributed
    values = config.read_yaml(path)
    cfg = config.load(stages.get(values["stage"]).StageConfig, path)
    assert config.flatten(cfg)["stage"] in path.stem or path.parent.name == "sweep"


class Section(config.Config):
    workers: Annotated[int, config.Changeable()] = 1
    shards: Annotated[str, config.Input("shards")]


class Marked(config.Config):
    data: Section
    other: Section | None = None
    codecs: Annotated[dict[str, str], config.Input("codec")]
    labeler: Annotated[str | None, config.Input("labeler", when="wanted")] = None
    images: Annotated[str, config.Input("shards", or_folder=True)] = "photos"
    wanted: bool = False


def test_inputs_and_changeable_keys_are_found_at_their_fields():
    cfg = Marked(data=Section(shards="a"), codecs={"x": "b"}, labeler="c")
    assert [(key, value) for key, value, _ in config.inputs(cfg)] == [
        ("data.shards", "a"),
        ("codecs.x", "b"),
        ("images", "photos"),
    ]
    assert config.changeable(cfg) == {"data.workers"}
    wanted = cfg.model_copy(update={"wanted": True, "other": Section(shards="d")})
    assert ("labeler", "c") in [(key, value) for key, value, _ in config.inputs(wanted)]
    assert config.changeable(wanted) == {"data.workers", "other.workers"}


def test_every_key_is_listed_with_its_own_default():
    from pipeline import config_keys
    from pipeline.stages import gan

    listed = {key.name: key for key in config_keys.keys(gan.StageConfig)}
    assert listed["generator_optimizer.betas"].default == "[0.5, 0.9]"
    assert listed["fit.steps"].default == ""
    assert listed["data.num_workers"].changeable
    assert not listed["data.batch_size"].changeable
    assert "discriminator(patch).channels" in listed
    assert all(key.about or key.name.endswith((".kind", "stage", "seed")) for key in listed.values() if key.changeable)
