"""Builds the native extension with CMake and ninja; all else is in pyproject.toml.

Environment: FASTDIFF_CUDA=AUTO|ON|OFF, FASTDIFF_CUDA_ARCHS="80;90a", FASTDIFF_HEAD_DIMS=few|default|all,
FASTDIFF_SANITIZE="address,undefined", FASTDIFF_NATIVE=OFF (pure Python on purpose). Without a C++ compiler the package
installs as pure Python: it works, on the PyTorch reference.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NOTICE = """
======================================================================================
fastdiff: {why}
Installing WITHOUT native kernels: everything works, on plain PyTorch and slower.
Install a C++17 compiler (g++ or clang++) and reinstall to get them.
======================================================================================
"""


def compiler() -> str | None:
    """The C++ compiler CMake will find, or None. A CXX that does not exist is an error, not a reason to go without."""
    if os.environ.get("CXX"):
        wanted = os.environ["CXX"].split()[0]
        if not shutil.which(wanted):
            raise SystemExit(f"fastdiff: CXX={wanted} was not found")
        return wanted
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        names = ("FASTDIFF_CUDA", "FASTDIFF_CUDA_ARCHS", "FASTDIFF_HEAD_DIMS", "FASTDIFF_SANITIZE")
        options = [f"-D{k}={os.environ[k]}" for k in names if os.environ.get(k)]
        environment = {**os.environ, "CMAKE_GENERATOR": os.environ.get("CMAKE_GENERATOR", "Ninja")}
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}", *options]
        # An earlier install from this checkout left paths of pip's build environment behind, which is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, check=True, env=environment)
        subprocess.run(["cmake", "--build", str(build), "--target", "_C"], check=True, env=environment)
        target.parent.mkdir(parents=True, exist_ok=True)
        built = sorted(build.glob("_C*.so")) + sorted(build.glob("_C*.pyd"))
        shutil.copy2(built[0], target)


off = os.environ.get("FASTDIFF_NATIVE", "").upper() == "OFF"
native = not off and compiler() is not None
if not native:
    sys.stderr.write(NOTICE.format(why="FASTDIFF_NATIVE=OFF." if off else "no C++ compiler was found."))

setup(ext_modules=[Extension("fastdiff._C", [])] if native else [], cmdclass={"build_ext": CMakeBuild})
