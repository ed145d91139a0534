"""The spec: every key has a default, every mistake has a sentence, and one spec has one hash."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.errors import Contradiction, LinkTooNarrow, SpecError, StagesDoNotDivide, UnknownKey
from koinon.model.layout import trained_count
from koinon.run.spec import RunSpec, TrainConfig, recipes


def test_an_empty_spec_is_a_run() -> None:
    spec = RunSpec.parse("")
    assert spec == RunSpec()
    assert spec.optim.steps == spec.train.steps
    assert spec.model.vocab == spec.data.vocab == 256


def test_the_size_dial_derives_the_rest_of_the_model() -> None:
    narrow, wide = (RunSpec.parse(f"[model]\nsize = {size}") for size in (128, 1024))
    assert wide.model.layers > narrow.model.layers
    assert wide.model.rank > narrow.model.rank
    assert wide.train == narrow.train


def test_a_spec_in_full_reads_back_as_itself() -> None:
    for spec in (RunSpec(), *map(RunSpec.recipe, recipes())):
        assert RunSpec.parse(spec.to_toml()) == spec
        assert RunSpec.parse(spec.to_toml()).run_id == spec.run_id


@given(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,20}", fullmatch=True),
    seed=st.integers(0, 2**53),
    source=st.text(min_size=1, max_size=30).filter(lambda text: "\r" not in text),
    rate=st.floats(1e-6, 1e12),
    lr=st.floats(1e-12, 1e3),
    groups=st.integers(1, 9),
)
def test_any_values_survive_toml(name: str, seed: int, source: str, rate: float, lr: float, groups: int) -> None:
    spec = RunSpec.of(
        name=name,
        seed=seed,
        data={"source": source},
        link={"rate_mbit": rate},
        optim={"muon_lr": lr},
        train={"batch": 3 * groups, "microbatch": 3},
    )
    assert RunSpec.parse(spec.to_toml()) == spec


def test_the_run_id_is_of_the_values_and_of_nothing_else() -> None:
    plain = RunSpec.parse("[train]\nsteps = 7\nbatch = 4\n")
    same = RunSpec.parse("# a comment\ntrain = { batch = 4, steps = 7 }\n[model]\nsize = 128\n")
    assert plain.run_id == same.run_id
    assert len(plain.run_id) == 64
    others = [
        RunSpec.parse(text) for text in ("[train]\nsteps = 8\nbatch = 4\n", "seed = 1\n[train]\nsteps=7\nbatch=4\n")
    ]
    assert len({plain.run_id, *(other.run_id for other in others)}) == 3


def test_the_run_id_is_the_same_in_every_process() -> None:
    script = "from koinon.run.spec import RunSpec; print(RunSpec.recipe('tiny').run_id)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == RunSpec.recipe("tiny").run_id


def test_reading_a_spec_loads_no_torch() -> None:
    script = "import sys; from koinon.run.spec import RunSpec; RunSpec.recipe('demo'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize(("name", "least", "most"), [("tiny", 5e4, 2e5), ("demo", 1e6, 2e6), ("small", 9e6, 11e6)])
def test_the_recipes_have_the_sizes_that_they_promise(name: str, least: float, most: float) -> None:
    spec = RunSpec.recipe(name)
    assert least < trained_count(spec.model) < most
    assert len(spec.model.cuts()) == spec.model.stages


def test_the_demo_is_four_stages_of_two_replicas() -> None:
    spec = RunSpec.recipe("demo")
    assert (spec.model.stages, spec.league.replicas, spec.data.source) == (4, 2, "stdlib")


# --- what is wrong, and what to do


def failure(text: str, **options: list[str]) -> SpecError:
    with pytest.raises(SpecError) as caught:
        RunSpec.parse(text, source="my.toml", **options)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("[train]\nstep = 3", "train.step", "train.steps"),
        ("[optim]\nmuonlr = 3", "optim.muonlr", "optim.muon_lr"),
        ("[modell]\nsize = 3", "modell", "model"),
        ("sed = 3", "sed", "seed"),
        ("[league]\nzzzzzz = 3", "league.zzzzzz", None),
        ("[optim]\nsteps = 3", "optim.steps", "train.steps"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest(text: str, key: str, nearest: str | None) -> None:
    error = failure(text)
    assert isinstance(error, UnknownKey)
    assert (error.key, error.nearest) == (key, nearest)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('\n[train]\nbatch = 4\nsteps = "many"', 'my.toml, line 4: `train.steps` must be a whole number, got "many".'),
        ("[train]\nsteps = true", "my.toml, line 2: `train.steps` must be a whole number, got true."),
        ("[train]\nsteps = 1.5", "my.toml, line 2: `train.steps` must be a whole number, got 1.5."),
        ("train.steps = []", "my.toml, line 1: `train.steps` must be a whole number, got []."),
        ("[optim]\nmuon_lr = '1'", 'my.toml, line 2: `optim.muon_lr` must be a number, got "1".'),
        ("[optim]\nbetas = [1, 2, 3]", "my.toml, line 2: `optim.betas` must be a list of 2 numbers, got [1, 2, 3]."),
        ("[model]\ncodec = 'int2'", '`model.codec` must be one of "fp32", "bf16", "int8", "int4", got "int2".'),
        ("[model]\ntrained_lifts = 1", "`model.trained_lifts` must be true or false, got 1."),
        ("name = 3", "my.toml, line 1: `name` must be text in quotes, got 3."),
        ("[link]\nrtt_ms = ''", '`link.rtt_ms` must be a number, got "".'),
        ("train = 3", "my.toml, line 1: `train` must be a table: write [train] on a line of its own."),
        ("[[train]]\nsteps = 3", "`train` must be a table"),
        ("[model]\nsize = 1" + "0" * 400, "`model.size` must be a whole number of at most 2^53"),
        ("[league]\ngrace_s = inf", "`league.grace_s` must be a number of at most 2^53"),
        ("[league]\ngrace_s = nan", "`league.grace_s` must be a number of at most 2^53"),
    ],
)
def test_a_wrong_type_says_key_line_expected_and_got(text: str, sentence: str) -> None:
    assert sentence in str(failure(text))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[train]\nbatch = 7\nmicrobatch = 2", "Set `batch` to 6"),
        ("[train]\nbatch = 1\nmicrobatch = 2", "Set `batch` to 2"),
        ("[train]\nsteps = 0", "`steps` is 0: it must be at least 1"),
        ("[league]\nreplicas = 3\nmax_workers = 11", "are 12 workers, but `max_workers` is 11"),
        ("[optim]\nl2 = 0.1\nweight_decay = 0.1", "set one of them to 0"),
        ("[optim]\nwarmup = 1.5", "`warmup` is 1.5"),
        ("[model]\nvocab = 300", "The byte tokenizer has 256 ids"),
        ("[model]\nvocab = 300\n[data]\nvocab = 256", "set one, and the other follows"),
        ("[model]\nsize = -4", "`model.size` is -4"),
        ("[model]\nsize = 128\nheads = 3", "no multiple of `heads`"),
        ("[model]\ncontext = 1000\n[data]\nmax_bytes = 1000", "`context` 1000 is longer than the text"),
        ("[data]\nheldout = 0", "hold some out"),
        ("name = '../x'", "`name` is '../x'"),
        ("seed = -1", "`seed` is -1"),
        ("[link]\nrate_mbit = 0", "`rate_mbit` is 0"),
    ],
)
def test_keys_that_cannot_both_hold_say_what_to_change(text: str, sentence: str) -> None:
    error = failure(text)
    assert isinstance(error, Contradiction)
    assert sentence in str(error)


def test_more_stages_than_layers_do_not_divide() -> None:
    assert isinstance(failure("[model]\nlayers = 3\nstages = 4"), StagesDoNotDivide)


def test_one_vocabulary_holds_for_model_and_tokenizer() -> None:
    from_model = RunSpec.parse("[model]\nvocab = 512\n[data]\ntokenizer = 'bpe'")
    from_data = RunSpec.parse("[data]\nvocab = 512\ntokenizer = 'bpe'")
    assert from_model == from_data
    assert RunSpec.parse("[data]\ntokenizer = 'bpe'").model.vocab > 256


@pytest.mark.parametrize("text", ["[train", "steps = ", "a = 1\na = 2", "x" * 99, "a = 1\n\n[a]\nb = 2", "a = '\x00'"])
def test_what_is_not_toml_says_so_with_a_line(text: str) -> None:
    assert "my.toml is not valid TOML" in str(failure(text))


def test_no_depth_or_length_of_toml_is_a_traceback() -> None:
    failure("seed = " + "[" * 5000 + "]" * 5000)
    failure("seed = " + "1" * 5000)
    failure("[" + ".".join("a" * 3000) + "]")


@given(st.text(max_size=80))
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    try:
        RunSpec.parse(text)
    except SpecError as error:
        sentence = str(error)
    else:
        sentence = "it is a spec"
    assert sentence


KEYS = [
    f"{table}.{key}"
    for table, keys in dataclasses.asdict(RunSpec()).items()
    for key in (keys if isinstance(keys, dict) else [""])
]
VALUES = st.one_of(
    st.integers(-3, 40),
    st.sampled_from(
        [0.0, 0.5, -1.0, 1e300, 10**30, float("nan"), float("inf"), True, "", "bpe", "dense", "int4", [0, 1]]
    ),
)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5))
def test_any_values_make_a_spec_that_reads_back_or_a_spec_error(values: dict[str, object]) -> None:
    tables: dict[str, object] = {}
    for key, value in values.items():
        table, _, name = key.rstrip(".").partition(".")
        if name:
            inner = tables.setdefault(table, {})
            assert isinstance(inner, dict)
            inner[name] = value
        else:
            tables[table] = value
    try:
        spec = RunSpec.of(**tables)
    except SpecError:
        return
    assert RunSpec.parse(spec.to_toml()) == spec


def test_a_file_that_cannot_be_read_is_a_spec_error(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "missing.toml", tmp_path, tmp_path / "binary.toml"):
        with pytest.raises(SpecError, match=str(path)):
            RunSpec.load(path)


def test_an_unknown_recipe_names_those_that_exist() -> None:
    with pytest.raises(SpecError, match="demo, small, tiny"):
        RunSpec.recipe("dmo")


def test_overrides_are_read_before_the_rest_is_derived(tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    path.write_text("[model]\nsize = 128\n")
    spec = RunSpec.load(path, overrides=["model.size=64", "train.steps = 5", "data.source=./texts", "name=mine"])
    assert spec == RunSpec.of(name="mine", model={"size": 64}, train={"steps": 5}, data={"source": "./texts"})
    for wrong in ("train.steps", "=3", "train..steps=3", "name.x=3"):
        with pytest.raises(SpecError):
            RunSpec.load(path, overrides=["name=mine", wrong])


# --- links


def test_links_that_carry_the_declared_speed_are_fine() -> None:
    spec = RunSpec.parse("[link]\nrate_mbit = 80\nrtt_ms = 50\ntokens_per_second = 1000")
    assert spec.link.rate_mbit == 80


def test_links_without_a_declared_speed_are_not_checked() -> None:
    RunSpec.parse("[link]\nrate_mbit = 0.001\nrtt_ms = 9000")


def test_a_boundary_too_wide_for_the_declared_rate_gives_the_numbers() -> None:
    """4 stages, rank 8 in int8: 10 bytes, sent two ways, over 2 replicas: 8 * 10 * 2 / 2 bits per token."""
    text = "[model]\nsize = 128\nstages = 4\n[link]\ntokens_per_second = 100_000\nrate_mbit = "
    RunSpec.parse(text + "8.0")
    error = failure(text + "7.9")
    assert isinstance(error, LinkTooNarrow)
    for part in (
        "8 coefficients in int8",
        "10 bytes per token",
        "sends 8 Mbit/s",
        "`rate_mbit` is 7.9",
        "98750 tokens",
    ):
        assert part in str(error)


def test_a_run_of_one_stage_has_no_boundaries_to_be_too_wide() -> None:
    RunSpec.parse("[model]\nstages = 1\n[link]\nrate_mbit = 0.001\nrtt_ms = 900\ntokens_per_second = 1e6")


def test_a_round_trip_too_long_for_what_is_under_way_gives_the_numbers() -> None:
    """3 boundaries of 100 ms: 0.3 s; 16 sequences of 100 tokens at most: 5333 tokens per second."""
    text = "[model]\ncontext = 100\n[train]\nbatch = 16\n[link]\nrtt_ms = 100\ntokens_per_second = "
    RunSpec.parse(text + "5333")
    error = failure(text + "5334")
    assert isinstance(error, LinkTooNarrow)
    assert "5333 tokens per second at best" in str(error)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 3  # type: ignore[misc]
