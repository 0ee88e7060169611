"""Slurm's own files of a cluster: slurm.conf, cgroup.conf, the names of hosts, munge's key."""

from __future__ import annotations

import os
import secrets

import psutil

from engram_megatron.local_cluster.settings import CONTROLLER, ClusterSettings

MIB = 1024**2
KEY_BYTES = 1024

# What follows Slurm's defaults is left out. Times are in seconds.
SLURM_CONF = """\
ClusterName=local
SlurmctldHost={controller_host}({controller_address})
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its old credentials have expired; the default is 120
AuthInfo=socket={munge_socket},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/spool/%n.pid
SlurmctldLogFile={logs}/slurmctld.log
SlurmdLogFile={logs}/slurmd.%n.log
MailProg=/bin/true
# neither cgroups nor systemd
ProctrackType=proctrack/linuxproc
# nodes claim the CPUs that they are told to, were there fewer
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# a node that does not answer is down after this; the default is 300
SlurmdTimeout=10
# a node that was away comes back by itself, one that was set down does not
ReturnToService=1
KillWait=10
BatchStartTimeout=10
UnkillableStepTimeout=30
# an ended job can be asked after for a day
MinJobAge=86400
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# a preempted job gets the signal of its own --signal
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def write_configuration(settings: ClusterSettings) -> None:
    """Make the folders of the cluster and the files in them."""
    folder = settings.folder
    for name in ("etc", "log", "munge", "state", "spool", "disks", "processes", "scratch"):
        (folder / name).mkdir(mode=0o755, exist_ok=True)
    settings.scratch.chmod(0o1777)
    settings.slurm_conf.write_text(slurm_conf(settings))
    # slurmd loads a cgroup plugin even when nothing uses cgroups; this one needs neither systemd nor a mount
    (settings.slurm_conf.with_name("cgroup.conf")).write_text("CgroupPlugin=cgroup/v1\n")
    settings.hosts_file.write_text(hosts(settings))
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(KEY_BYTES))


def slurm_conf(settings: ClusterSettings) -> str:
    return SLURM_CONF.format(
        controller_host=settings.controller_host,
        controller_address=settings.controller_address,
        controller_port=settings.controller_port,
        user=os.geteuid(),
        munge_socket=settings.munge_socket,
        folder=settings.folder,
        logs=settings.logs,
        nodes=node_lines(settings),
    )


def node_lines(settings: ClusterSettings) -> str:
    """Every node has the machine's memory: jobs do not reserve any."""
    memory_mib = psutil.virtual_memory().total // MIB
    host = "" if settings.isolated else f" NodeHostname={settings.controller_host}"
    return "\n".join(
        f"NodeName={node.name}{host} NodeAddr={node.address} Port={node.port} CPUs={settings.cpus_per_node}"
        f" RealMemory={memory_mib} State=UNKNOWN"
        for node in settings.nodes
    )


def hosts(settings: ClusterSettings) -> str:
    """/etc/hosts of the machines in namespaces: the cluster, and the machine itself as the one where users log in."""
    lines = ["127.0.0.1 localhost", "::1 localhost", f"{settings.controller_address} {CONTROLLER}"]
    lines.append(f"{settings.host_address} {os.uname().nodename}")
    lines += [f"{node.address} {node.name}" for node in settings.nodes]
    return "\n".join(lines) + "\n"
