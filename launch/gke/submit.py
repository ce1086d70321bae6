"""A run of fac on slices of TPU in GKE: fills in jobset.yaml and gives it to `kubectl apply`.

    python launch/gke/submit.py --name wide --image IMAGE --claim runs --tpu v5e --topology 16x16 \\
        -- train configs/mine.yaml --run.dir /data/runs/wide

The image is what launch/gke/Dockerfile builds; the claim is a PersistentVolumeClaim that all hosts may write
(ReadWriteMany, of Filestore for instance), mounted at /data, where the store and the run must lie. `--print` shows the
YAML and applies nothing. Needs nothing but Python and kubectl.
"""

from __future__ import annotations

import argparse
import json
import re
import string
import subprocess
import sys
from pathlib import Path

ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
"""What GKE calls each generation, in the label of its nodes."""


class Template(string.Template):
    """`%{name}`, since the shell in the template has dollars of its own."""

    delimiter = "%"


def main(arguments: list[str] | None = None) -> int:
    """Render, then print or apply; returns kubectl's exit status."""
    parsed, command = _parse(sys.argv[1:] if arguments is None else arguments)
    rendered = render(parsed, command)
    if parsed.print:
        print(rendered, end="")
        return 0
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=rendered, text=True).returncode


def render(parsed: argparse.Namespace, command: list[str]) -> str:
    """The JobSet as YAML."""
    chips_in_slice = 1
    for side in parsed.topology.split("x"):
        chips_in_slice *= int(side)
    chips = min(parsed.chips_per_host, chips_in_slice)
    hosts = chips_in_slice // chips
    values = {
        "name": parsed.name,
        "image": json.dumps(parsed.image),  # JSON is YAML: whatever a value holds, it is quoted rightly
        "claim": json.dumps(parsed.claim),
        "accelerator": ACCELERATORS[parsed.tpu],
        "topology": parsed.topology,
        "slices": parsed.slices,
        "hosts": hosts,
        "processes": hosts * parsed.slices,
        "chips": chips,
        "restarts": parsed.restarts,
        "grace": parsed.grace,
        "arguments": json.dumps([word.replace("$", "$$") for word in command]),  # Kubernetes expands $(NAME) in args
    }
    return Template((Path(__file__).parent / "jobset.yaml").read_text()).substitute(values)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        usage="python launch/gke/submit.py --name NAME --image IMAGE --claim CLAIM --topology 16x16 [options] "
        "-- VERB CONFIG [flags of fac]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--name", type=_name, required=True, help="of the JobSet; a restarted run keeps it")
    parser.add_argument("--image", required=True, help="that launch/gke/Dockerfile built")
    parser.add_argument("--claim", required=True, help="PersistentVolumeClaim for /data")
    parser.add_argument("--tpu", choices=list(ACCELERATORS), default="v5e", help="generation (default: v5e)")
    parser.add_argument("--topology", type=_topology, required=True, help="of a slice, such as 16x16 or 4x4x8")
    parser.add_argument(
        "--chips-per-host", type=_count, default=4, metavar="N", help="default: 4; 8 on ct5lp-hightpu-8t"
    )
    parser.add_argument("--slices", type=_count, default=1, metavar="N", help="default: 1")
    parser.add_argument("--restarts", type=_whole, default=3, metavar="N", help="of the whole run (default: 3)")
    parser.add_argument("--grace", type=_count, default=180, metavar="S", help="seconds before SIGKILL (default: 180)")
    parser.add_argument("--print", action="store_true", help="show the YAML, apply nothing")
    if "--" not in arguments and not {"-h", "--help"} & set(arguments):
        parser.error("what fac shall do comes after `--`, for instance: -- train configs/mine.yaml")
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    parsed = parser.parse_args(own)
    command = arguments[len(own) + 1 :]
    if not command:
        parser.error("nothing after `--`: what shall fac do?")
    return parsed, command


def _name(text: str) -> str:
    # A pod's name, NAME-fac-SLICE-HOST-xxxxx, is a DNS label of at most 63 characters.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be at most 40 of a-z, 0-9 and -, and begin with a letter")
    return text


def _topology(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 16x16 or 4x4x8")
    return text


def _whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _count(text: str) -> int:
    return _whole(text, 1)


if __name__ == "__main__":
    sys.exit(main())
