"""What each cluster announces, as its processes would see it."""

import os

import pytest

from launch.distributed import IN_ORDER, ProcessSettings, first_host, raise_fake_device_timeout, settings

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "node[03-04,9]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def test_a_lone_process_announces_nothing():
    assert settings({}) is None
    assert settings({"SLURM_JOB_ID": "17"}) is None  # inside sbatch, outside srun


def test_explicit_settings_win_over_the_cluster():
    assert settings(SLURM | EXPLICIT) == ProcessSettings("explicit settings", "10.0.0.1:1234", 4, 3)


def test_incomplete_explicit_settings_name_what_is_missing():
    with pytest.raises(ValueError, match="JAX_PROCESS_ID must also be set"):
        settings({key: EXPLICIT[key] for key in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES")})


def test_a_process_id_outside_the_job_is_refused():
    with pytest.raises(ValueError, match="between 0 and JAX_NUM_PROCESSES - 1 = 3"):
        settings(EXPLICIT | {"JAX_PROCESS_ID": "4"})


def test_slurm_takes_the_first_host_and_a_port_from_the_job():
    found = settings(SLURM)
    assert found is not None
    assert (found.coordinator, found.num_processes, found.process_id) == ("node03:61457", 2, 1)
    assert found.local_device_ids is None


def test_slurm_shares_the_gpus_of_a_node_among_its_tasks():
    gpus = {
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_LOCALID": "1",
    }
    found = settings(SLURM | gpus)
    assert found is not None and found.local_device_ids == [4, 5, 6, 7]


def test_slurm_gives_one_task_a_node_all_its_gpus():
    found = settings(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"})
    assert found is not None and found.local_device_ids is None


@pytest.mark.parametrize(
    ("nodes", "host"), [("a[1-2],b3", "a1"), ("gpu-7", "gpu-7"), ("n[003,9]", "n003"), ("x,y", "x")]
)
def test_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_open_mpi_reads_the_launchers_host():
    env = {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    }
    found = settings(env)
    assert found is not None
    assert found.coordinator is not None and found.coordinator.startswith("10.96.0.1:")
    assert (found.num_processes, found.process_id) == (2, 1)


def test_open_mpi_without_a_host_says_what_to_set():
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS"):
        settings({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"})


def test_tpu_pods_and_indexed_jobs_are_left_to_jax():
    assert settings({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}) == ProcessSettings("TPU pod")
    assert settings({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}) == ProcessSettings(
        "Kubernetes"
    )
    assert settings({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None


def test_fake_devices_get_threads_and_what_was_set_before_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    for _ in range(2):
        raise_fake_device_timeout(100)
    assert os.environ["XLA_FLAGS"] == f"{IN_ORDER} --xla_cpu_enable_fast_math=false"
    assert os.environ["PJRT_NPROC"] == "800"
    monkeypatch.setenv("PJRT_NPROC", "3")
    raise_fake_device_timeout(100)
    assert os.environ["PJRT_NPROC"] == "3"
