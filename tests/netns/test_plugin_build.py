"""The plugin's own Makefile, from a clean tree; and its code under AddressSanitizer."""

import shutil
import subprocess
from pathlib import Path

import pytest
from plugin_rules import PLUGIN, lines, ours, restore_file

pytestmark = pytest.mark.netns


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources alone, as a fresh checkout has them."""
    for folder in (PLUGIN, PLUGIN.parent / "kernel"):
        shutil.copytree(
            folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("*.so", "*.o", "asan")
        )
    return tmp_path / PLUGIN.name


def _make(tree: Path, *words: str) -> None:
    subprocess.run(["make", "-s", "-C", tree, *words], check=True)


def _files(tree: Path) -> set[str]:
    return {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_it_builds_without_a_warning_and_clean_leaves_the_sources(tree, compiler):
    before = _files(tree)
    _make(tree, f"CC={compiler}")
    assert _files(tree) - before == {"libxt_MARK.so"}
    _make(tree, "clean")
    assert _files(tree) == before


def test_install_writes_one_file_where_it_is_told(tree, tmp_path):
    _make(tree, "install", f"DESTDIR={tmp_path}/root", "XTLIBDIR=/usr/lib/xtables")
    assert _files(tmp_path / "root") == {"usr/lib/xtables/libxt_MARK.so"}


@pytest.mark.parametrize("variant", ["iptables-legacy", "ip6tables-nft"])
def test_no_line_makes_it_touch_memory_that_is_not_its_own(ns, tree, variant):
    _make(tree, "asan")
    asked = (["gcc", f"-print-file-name=lib{name}.so"] for name in ("asan", "ubsan"))
    preload = [subprocess.check_output(words, text=True).strip() for words in asked]
    env = {
        **ours(tree / "asan"),
        "LD_PRELOAD": ":".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # iptables frees at its exit what it frees at all
        "UBSAN_OPTIONS": "halt_on_error=1",
    }
    stock_ok = [line for line in lines() if line.ok and line.is_stock]
    ns.run(f"{variant}-restore", env=env, input=restore_file(stock_ok))
    for option in ("-S", "-L"):
        ns.run(variant, "-t", "mangle", option, env=env)
    first = stock_ok[0]
    ns.run(variant, "-t", "mangle", "-D", first.chains[0], *first.words, env=env)
    for line in lines():
        if line not in stock_ok:
            done = ns.run(
                variant, "-t", line.table, "-A", line.chains[0], *line.words, env=env, check=False
            )
            assert done.returncode in (1, 2), f"{line.where}: {done.stderr}"
            assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr
