"""The native kernels, for tests that need them: built in the user's cache if they are not yet."""

import pytest
from attnrewrite.backends.native import build, library

if (reason := build.obstacle()) and build.find() is None:
    pytest.skip(f"native kernels: {reason}", allow_module_level=True)
if build.find() is None:
    build.build(build.cache_folder())
assert library.missing() is None, library.missing()
kernels = library.kernels()
