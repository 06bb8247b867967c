"""Build of the package; metadata is in pyproject.toml.

The C++ operators are not part of the package yet: this builds pure Python, with or without
VTP_BUILD_CPP=0 in the environment.
"""

from setuptools import setup

setup()
