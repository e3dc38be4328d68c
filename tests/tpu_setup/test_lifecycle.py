"""Creating and deleting a TPU against a stand-in gcloud."""

import pytest

CREATE = ("--type", "v5litepod-8", "--poll", "0")


def verbs(cloud) -> list[str]:
    return [call[3] for call in cloud.calls() if call[3] != "describe"]


def test_create_waits_until_the_queued_resource_is_active(cloud):
    cloud.after_create(1, queue="ACCEPTED WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    done = cloud.run("create", *CREATE, "--spot")
    assert done.returncode == 0, done.stderr
    assert cloud.calls("create") == [
        "compute tpus queued-resources create my-tpu --node-id=my-tpu "
        "--project=my-project --zone=us-east5-b --accelerator-type=v5litepod-8 --spot "
        "--runtime-version=v2-alpha-tpuv5-lite --async --quiet".split()
    ]
    # absent, then the four states after the create, then the node
    assert [c[2] for c in cloud.calls("describe")] == ["queued-resources"] * 5 + [
        "tpu-vm"
    ]


def test_an_active_tpu_is_adopted(cloud):
    assert cloud.run("create", *CREATE).returncode == 0
    assert cloud.run("create", *CREATE).returncode == 0
    assert verbs(cloud) == ["create"]


def test_a_request_in_the_queue_is_waited_for(cloud):
    cloud.set_states(queue="WAITING_FOR_RESOURCES PROVISIONING ACTIVE", node="READY")
    assert cloud.run("create", *CREATE).returncode == 0
    assert verbs(cloud) == []


@pytest.mark.parametrize(
    "queue, node",
    [
        ("SUSPENDED", "PREEMPTED"),
        ("FAILED", "-"),
        ("SUSPENDING SUSPENDED", "-"),
        ("ACTIVE", "PREEMPTED"),
    ],
)
def test_a_lost_tpu_is_deleted_and_requested_again(cloud, queue, node):
    cloud.set_states(queue=queue, node=node)
    done = cloud.run("create", *CREATE)
    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ["delete", "create"]
    assert "--force" in cloud.calls("delete")[0]


def test_a_request_that_fails_at_once_is_not_repeated(cloud):
    cloud.after_create(1, queue="FAILED")
    done = cloud.run("create", *CREATE)
    assert done.returncode == 1 and "failed at once" in done.stderr
    assert verbs(cloud) == ["create"]


def test_an_error_of_describe_is_not_taken_for_absence(cloud):
    (cloud.root / "outage").touch()
    for script, arguments in (
        ("create", CREATE),
        ("delete", ("--yes",)),
        ("status", ()),
    ):
        done = cloud.run(script, *arguments)
        assert done.returncode == 1 and "no credentials" in done.stderr
    assert verbs(cloud) == []


def test_waiting_ends_at_the_timeout_and_leaves_the_request(cloud):
    cloud.set_states(queue="WAITING_FOR_RESOURCES", node="-")
    done = cloud.run("create", *CREATE, "--timeout", "0")
    assert done.returncode == 4 and "WAITING" in done.stderr
    assert verbs(cloud) == []


def test_direct_creation_replaces_a_preempted_node(cloud):
    cloud.set_states(queue="-", node="PREEMPTED")
    done = cloud.run("create", *CREATE, "--direct")
    assert done.returncode == 0, done.stderr
    assert [call[2:4] for call in cloud.calls() if call[3] != "describe"] == [
        ["tpu-vm", "delete"],
        ["tpu-vm", "create"],
    ]
    assert "--version=v2-alpha-tpuv5-lite" in cloud.calls("create")[0]


def test_delete_asks_first(cloud):
    cloud.set_states(queue="ACTIVE", node="READY")
    for answer in ("", "n\n", "maybe\n"):
        done = cloud.run("delete", answer=answer)
        assert done.returncode == 1 and "nothing deleted" in done.stderr
    assert verbs(cloud) == []
    assert cloud.run("delete", answer="y\n").returncode == 0
    assert verbs(cloud) == ["delete"]


def test_delete_removes_what_there_is_and_can_be_repeated(cloud):
    cloud.set_states(queue="SUSPENDED", node="-")
    assert cloud.run("delete", "--yes").returncode == 0
    assert cloud.calls("delete")[0][2:4] == ["queued-resources", "delete"]
    assert "--force" in cloud.calls("delete")[0]
    assert cloud.run("delete", "--yes").returncode == 0
    cloud.set_states(queue="-", node="READY")
    assert cloud.run("delete", "--yes").returncode == 0
    assert cloud.calls("delete")[1][2:4] == ["tpu-vm", "delete"]
    assert len(cloud.calls("delete")) == 2
