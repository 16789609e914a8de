"""torchvision imports beside a CPU build of torch: after `ebwm_dist`, in workers, and through the .pth file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]

USE = """
import torch, torchvision, torchvision.transforms.v2 as v2
from torchvision.utils import make_grid
assert make_grid(torch.rand(4, 3, 8, 8)).shape[0] == 3
assert v2.Resize(4)(torch.rand(3, 8, 8)).shape == (3, 4, 4)
"""

# The workers of the loader are spawned, and so import torchvision anew, because they unpickle the transform.
WORKERS = """
class Images(torch.utils.data.Dataset):
    resize = v2.Resize(4)
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return self.resize(torch.rand(3, 8, 8))

if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(Images(), num_workers=1, multiprocessing_context="spawn")
    assert [image.shape for image in loader] == [(1, 3, 4, 4)] * 2
"""


def run(program: Path | str, path: Path = ROOT, *options: str) -> None:
    command = [sys.executable, *options, *([str(program)] if isinstance(program, Path) else ["-c", program])]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    result = subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_is_cheap() -> None:
    run(
        "import importlib.util, sys, ebwm_dist\n"
        "assert importlib.util.find_spec('torchvision')\n"
        "assert 'torch' not in sys.modules and 'omegaconf' not in sys.modules"
    )


def test_after_importing_the_package_and_in_workers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import sys, ebwm_dist\n{USE}\n{WORKERS}")
    run(script)


def test_through_the_installed_pth_file(tmp_path: Path) -> None:
    """`-S` leaves out the environment's own .pth files; both files lie where the installation puts them."""
    shutil.copy(ROOT / "ebwm_dist" / "torchvision_compat.py", tmp_path / "_ebwm_dist_torchvision.py")
    shutil.copy(ROOT / "ebwm_dist_torchvision.pth", tmp_path)
    packages = str(Path(torch.__file__).parents[1])
    run(
        f"import site, sys\nsys.path.append({packages!r})\nsite.addsitedir({str(tmp_path)!r})\n"
        f"assert 'torch' not in sys.modules and 'ebwm_dist' not in sys.modules\n{USE}",
        tmp_path,
        "-S",
    )
