"""The memory plans of two of the largest releases, from shapes alone.

    .venv/bin/python -m bench.large_plans --clt /tmp/clt/gemma-scope-2-270m-pt/clt/width_262k_l0_medium

The 27b resid_post SAE of 1,048,576 features is stood in for by a sparse file of its real size (45 GB that take no disk):
a plan reads headers only. The CLT is the one that `bench.clt_memory` writes. Each is planned for the memory of this
machine, of a 24 GB and of an 80 GB device.
"""

import argparse
import json
import tempfile
from pathlib import Path

from scopeatlas.planning import Work, plan_releases

D_MODEL, FEATURES = 5376, 1048576
SHAPES = {
    "w_enc": (D_MODEL, FEATURES),
    "b_enc": (FEATURES,),
    "threshold": (FEATURES,),
    "w_dec": (FEATURES, D_MODEL),
    "b_dec": (D_MODEL,),
}


def write_sparse(folder: Path) -> Path:
    """Config and a safetensors file whose data are holes."""
    target = folder / "gemma-scope-2-27b-pt" / "resid_post" / "layer_31_width_1m_l0_medium"
    target.mkdir(parents=True)
    header, end = {}, 0
    for name, shape in SHAPES.items():
        size = 4
        for axis in shape:
            size *= axis
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (target / "params.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clt", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of the corpus that is planned for")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folders = [arguments.clt, write_sparse(Path(folder))]
        for memory in (None, 24, 80):
            print(f"--- {'this machine' if memory is None else f'{memory} GB'}")
            given = None if memory is None else memory * 10**9
            plan = plan_releases([str(f) for f in folders], Work(arguments.tokens, memory_bytes=given), store=Path())
            print("\n".join(plan.memory.lines()))


if __name__ == "__main__":
    main()
