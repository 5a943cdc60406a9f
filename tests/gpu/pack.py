"""The photographs that travel to a GPU machine beside the tree, and the weights that come back.

    pack.py pack --idrid IDRID --grades GRADES.csv --out FOLDER [--max-mb 38]
    pack.py join FOLDER NAME OUT.safetensors        parts of a network, in half precision -> a checkpoint

Nothing of a photograph is lost: IDRiD's JPEGs at full size take 0.38 MB, at half size and quality 95 they would take
0.62. Masks are written as 1-bit PNG, pixel for pixel. Those of the optic disc stay behind, and the healthy photographs
that do not fit.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

from ma_cluster.config import SplitConfig  # noqa: E402
from ma_cluster.images.datasets import Sample, decode_mask, kind_of, read_dataset, read_healthy, read_object  # noqa: E402

LAYOUT = "A. Segmentation"


def pack(idrid: str, grades: str | None, out: Path, max_bytes: int) -> dict[str, int]:
    """Write FOLDER/idrid, in IDRiD's layout, and FOLDER/grades.csv with its photographs, as `train` takes them.

    One healthy photograph of four validates, where there are as many.
    """
    from PIL import Image

    split, total, samples = SplitConfig(), 0, read_dataset(idrid, SplitConfig())
    for sample in samples:
        for url in (sample.image, sample.mask, *sample.other_masks):
            if url is None or kind_of(url) == "OD":
                continue
            data, place = read_object(url), out / "idrid" / LAYOUT / url.partition(f"{LAYOUT}/")[2]
            if url != sample.image:
                mask = io.BytesIO()
                Image.fromarray(decode_mask(data)).save(mask, "PNG", optimize=True)
                data, place = mask.getvalue(), place.with_suffix(".png")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
            total += len(data)
    healthy, rows = read_healthy(grades, split) if grades else [], ["image,grade"]
    (out / "healthy").mkdir(exist_ok=True)
    for sample in one_of_four_validates(healthy):
        data, name = read_object(sample.image), sample.image.rpartition("/")[2]
        row = f"healthy/{name},0"
        if total + len(data) + len("\n".join([*rows, row])) + 1 > max_bytes:
            break
        (out / "healthy" / name).write_bytes(data)
        rows.append(row)
        total += len(data)
    table = "\n".join(rows) + "\n"
    (out / "grades.csv").write_text(table)
    return {"photographs": len(samples), "healthy": len(rows) - 1, "bytes": total + len(table)}


def one_of_four_validates(samples: list[Sample]) -> list[Sample]:
    """In an order in which any first part has about a quarter that validates."""
    train, validate = ([s for s in samples if s.split == part] for part in ("training", "validation"))
    ordered: list[Sample] = []
    while train or validate:
        ordered += [*train[:3], *validate[:1]]
        train, validate = train[3:], validate[1:]
    return ordered


def join(folder: Path, name: str, out: Path) -> None:
    """The parts of a network -> a checkpoint in float32 that `bundle` and `--init` take."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors, metadata = {}, {}
    for part in sorted(folder.glob(f"{name}.*.safetensors")):
        with safe_open(part, "pt") as file:
            metadata |= file.metadata() or {}
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if not tensors:
        raise SystemExit(f"no parts {name}.*.safetensors in {folder}")
    counts = {key: value if value.dtype.is_floating_point is False else value.float() for key, value in tensors.items()}
    save_file(counts, out, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing, joining = commands.add_parser("pack"), commands.add_parser("join")
    packing.add_argument("--idrid", required=True)
    packing.add_argument("--grades")
    packing.add_argument("--out", type=Path, required=True)
    packing.add_argument("--max-mb", type=float, default=38.0)
    joining.add_argument("folder", type=Path)
    joining.add_argument("name")
    joining.add_argument("out", type=Path)
    given = parser.parse_args()
    if given.command == "pack":
        packed = pack(given.idrid, given.grades, given.out, int(given.max_mb * 1e6))
        print(json.dumps(packed))  # noqa: T201
    else:
        join(given.folder, given.name, given.out)


if __name__ == "__main__":
    main()
