import pytest


@pytest.fixture(scope="session")
def ray_here():
    """One Ray of two CPUs for all tests of a process: starting it takes seconds."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()
