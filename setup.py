"""Build the two Python packages, their cffi modules, the iptables plugin and the eBPF objects.

The kernel module is not built here: it belongs to a kernel, not to a Python
environment (``make module`` or DKMS builds it), so this never needs headers.
The eBPF objects fit any kernel: they need clang here, and nothing where they
are loaded.
"""

import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PLUGIN = Path("vnet/ext/iptables")
BPF = Path("vnet/ext/bpf")
# What `netflow serve` needs, and nothing else does.
SERVE = ["fastapi>=0.115", "uvicorn>=0.30"]


class BuildWithPlugin(build_py):
    """build_py, then compile libxt_MARK.so and the eBPF objects as package data."""

    def run(self):
        super().run()
        subprocess.run(["make", "-s", "-C", PLUGIN], check=True)
        where = Path("vnet/py") if self.editable_mode else Path(self.build_lib)
        target = where / "vnet" / "xtables"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PLUGIN / "libxt_MARK.so", target / "libxt_MARK.so")
        objects = (where / "vnet" / "bpf_objects").resolve()
        subprocess.run(["make", "-s", "-C", BPF, f"OUT={objects}"], check=True)


setup(
    name="vnet",
    version="0.1.0",
    description="Marks, accounts for and isolates the traffic of the slices of a shared host",
    license="GPL-2.0-only",
    python_requires=">=3.11",
    package_dir={"": "vnet/py", "netflow": "netflow"},
    packages=[
        "vnet",
        "vnet.check",
        "vnet.testing",
        "netflow",
        "netflow.history",
        "netflow.ipfix",
        "netflow.language",
        "netflow.questions",
        "netflow.serve",
        "netflow.store",
    ],
    package_data={
        "vnet": ["py.typed"],
        "netflow": ["py.typed"],
        "netflow.language": ["grammar.lark"],
    },
    cffi_modules=[
        "vnet/py/vnet/_abi_build.py:ffibuilder",
        "vnet/py/vnet/_bpf_build.py:ffibuilder",
        "netflow/_ct_build.py:ffibuilder",
    ],
    cmdclass={"build_py": BuildWithPlugin},
    install_requires=[
        "cffi>=1.17",
        "click>=8.1",
        "duckdb>=1.1",
        "inotify_simple>=1.3",
        "lark>=1.2",
        "msgspec>=0.18",
        "numpy>=1.26",
        "prometheus_client>=0.21",
        "pyroute2>=0.9",
        "python-iptables>=1.2",
        "rich>=13",
    ],
    extras_require={
        "bench": ["matplotlib>=3.8"],
        "check": ["scapy>=2.5"],
        "report": ["matplotlib>=3.8"],
        "serve": SERVE,
        "test": [
            "hypothesis",
            "matplotlib>=3.8",
            "mypy",
            "pytest>=8.3",
            "pytest-rerunfailures>=16.7",
            "ruff",
            "scapy>=2.5",
            "schemathesis>=4",
            "virtme-ng>=1.30",
            *SERVE,
        ],
    },
    entry_points={
        "console_scripts": ["vnet = vnet.cli:main", "netflow = netflow.cli:main"],
        "pytest11": ["vnet = vnet.testing.plugin"],
    },
)
