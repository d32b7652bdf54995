"""How hard Hypothesis looks: the same few examples every time,
or `pytest --hypothesis-profile=deep`.
"""
import pytest
import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ["support.exercises", "support.parallel"]
COMMON = dict(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
for name in ("default", "ci"):
    settings.register_profile(name, derandomize=True, max_examples=60, database=None, **COMMON)
settings.register_profile("deep", max_examples=5000, **COMMON)
settings.load_profile("default")


@pytest.fixture(autouse=True, scope="session")
def full_float32():
    """float32 means float32: no TF32 where the tests hold a GPU against NumPy.  And one thread: on
    tensors as small as these more cost time.
    """
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
