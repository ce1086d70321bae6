"""`fac convert --sae`: there and back is the same SAE, and the command says what it did or what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fac_jax import cli
from fac_jax.sae.checkpoint import read_card, read_sae, save_sae
from fac_jax.sae.convert import Form, convert_sae
from fac_jax.sae.model import SAE

DATA = Path(__file__).parents[1] / "data" / "sae_lens"
QUICKSTART = str(Path(__file__).parents[2] / "configs/quickstart.yaml")
CARD = {"layer": 2, "variant": "jumprelu", "model": "tiny", "model_digest": "01", "rows": 9, "steps": 3, "metrics": {}}


def arrays_of(kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = {"w_fd": (32, 8), "b_enc_f": (32,), "b_dec_d": (8,)}
    names |= {"w_enc_fd": (32, 8)} if "untied" in kind else {}
    names |= {"threshold_f": (32,)} if "threshold" in kind else {}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in names.items()}


@pytest.mark.parametrize("kind", ["tied", "untied", "tied-threshold", "untied-threshold"])
def test_there_and_back_is_the_same_to_the_bit(kind: str, tmp_path: Path) -> None:
    arrays, k = arrays_of(kind), None if "threshold" in kind else 4
    first = save_sae(tmp_path / "ours", SAE(**arrays), {**CARD, "k": k})
    forms: tuple[Form, ...] = ("fac", "sae_lens", "sae_lens", "fac")
    source = tmp_path / "ours"
    for number, form in enumerate(forms):
        convert_sae(source, tmp_path / str(number), form)
        source = tmp_path / str(number)
        card, found = read_sae(source)
        assert (card.digest, card.k, card.layer, card.model, card.variant) == (first.digest, k, 2, "tiny", "jumprelu")
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
    assert read_card(tmp_path / "0") == first  # all that we know of ours stays
    assert read_card(source).model_digest is None  # SAELens's form has no place for it


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["convert", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_says_what_it_wrote(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source, to = str(DATA / "topk-checkpoint"), str(tmp_path / "ours")
    status, out, _ = run(capsys, "--sae", source, "--to", to, "--k", "7")
    assert status == 0 and out == f"written: {to} (64 features of width 16, layer 3, K 7)\n"
    assert read_card(to).k == 7
    back = str(tmp_path / "back")
    status, out, _ = run(capsys, QUICKSTART, "--sae", to, "--to", back, "--format=sae_lens")
    assert status == 0 and (tmp_path / "back" / "cfg.json").is_file() and read_sae(back)[0].k == 7
    status, out, _ = run(capsys, "--sae", str(DATA / "batchtopk-trained"), "--to", str(tmp_path / "threshold"))
    assert status == 0 and "a threshold each" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sae", "{sae}"], "fac convert needs --to FOLDER, the folder to write"),
        (["--sae"], "--sae needs a value: SAE: convert this SAE"),
        (["--to", "{to}"], "needs a CONFIG, whose backbone it converts, or --sae SAE"),
        (["--to", "{to}", "--k", "3"], "--k 3 is for an SAE: name it with --sae"),
        (["--sae", "{sae}", "--to", "{to}", "--format", "saelens"], "(did you mean 'sae_lens'?); choose fac or"),
        (["--sae", "{sae}", "--to", "{to}", "--k", "-3"], "--k is '-3'; it must be a whole number above 0"),
        (["--sae", "{sae}", "--to", "{to}", "--k", "65"], "has 64 features and K 65; K must lie between 1 and 64"),
        (["--sae", "{sae}", "--to", "{full}"], "already holds something; remove it or name another folder"),
        (["--sae", "{to}", "--to", "{to}"], "nothing is there; give an SAE folder of fac_jax (config.json) or of"),
        (["--sae", "{full}", "--to", "{to}"], "(config.json is missing)"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").write_text("")
    places = {"sae": DATA / "topk-checkpoint", "to": tmp_path / "to", "full": full}
    status, _, err = run(capsys, *(argument.format(**places) for argument in arguments))
    assert status == 1 and message in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]  # nothing half made
