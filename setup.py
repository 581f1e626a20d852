"""The top-level folders `patterns/` and `backends/` install as sub-packages of `attnrewrite`."""

from setuptools import find_packages, setup

FOLDERS = {
    "attnrewrite": "attnrewrite",
    "attnrewrite.patterns": "patterns",
    "attnrewrite.backends": "backends",
}

packages = [
    name
    for package, folder in FOLDERS.items()
    for name in (package, *(f"{package}.{child}" for child in find_packages(folder)))
]

setup(packages=packages, package_dir=FOLDERS)
