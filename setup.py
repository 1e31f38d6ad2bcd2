from setuptools import setup

PACKAGE_DIR = {
    "stdit_fast": "stdit_fast",
    "stdit_fast.kernels": "kernels",
    "stdit_fast.train": "train",
    "stdit_fast.benchmarks": "benchmarks",
}
setup(package_dir=PACKAGE_DIR, packages=["stdit_fast", "stdit_fast.ops", "stdit_fast.model", "stdit_fast.diffusion", "stdit_fast.encoders", "stdit_fast.parallel", "stdit_fast.kernels", "stdit_fast.train", "stdit_fast.benchmarks"])
