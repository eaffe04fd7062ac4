#!/usr/bin/env bash
# A Slurm of one node, for the time of this script: starts munged, slurmctld and slurmd from Debian's packages in a temporary folder, runs notebooks
# at smoke size through profiles/slurm, and checks that Slurm ran every one of them. Needs root; skipped where a Slurm is configured or none installed.
# Usage: tests/slurm/one_node.sh [NOTEBOOKS]   (default: 00 01 10; packages: apt-get install slurm-wlm munge)
set -euo pipefail
cd "$(dirname "$0")/../.."
python="$PWD/.venv/bin/python"
for tool in munged slurmctld slurmd sbatch; do
  PATH="$PATH:/usr/sbin" command -v "$tool" >/dev/null || { echo "skipped: no $tool here (apt-get install slurm-wlm munge)"; exit 0; }
done
[ "$(id -u)" = 0 ] || { echo "skipped: slurmd needs root"; exit 0; }
"$python" -c "import snakemake_executor_plugin_slurm" 2>/dev/null || { echo "skipped: no plugin for Slurm (pip install -e '.[cluster]')"; exit 0; }
PATH="$PATH:/usr/sbin"
notebooks=("${@:-00}")
[ $# -gt 0 ] || notebooks=(00 01 10)

place="$(mktemp -d)"
export ADVLAB_HOME="$place/home"
conf=/etc/slurm/slurm.conf  # the place where srun looks; a variable does not reach it, since the plugin clears SLURM_* from its jobs
[ ! -e "$conf" ] || { echo "skipped: there is a $conf, so use that Slurm: python -m advlab run --on slurm"; exit 0; }
stop() {
  for daemon in slurmd slurmctld munged; do
    [ ! -f "$place/$daemon.pid" ] || kill "$(cat "$place/$daemon.pid")" 2>/dev/null || true
  done
  rm -f "$conf"
  sleep 2
  [ -n "${KEEP:-}" ] && echo "kept: $place" || rm -rf "$place"
}
trap stop EXIT
mkdir -p "$place"/{home,state,spool}
chmod 755 "$place"
head -c 128 /dev/urandom >"$place/munge.key"
chmod 600 "$place/munge.key"
chown -R root: "$place"
read -r cpus memory < <(slurmd -C | sed -nE 's/.*CPUs=([0-9]+).*RealMemory=([0-9]+).*/\1 \2/p')
host="$(hostname -s)"
mkdir -p "$(dirname "$conf")"
cat >"$conf" <<EOF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=36817
SlurmdPort=36818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$place/munge.socket
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
MinJobAge=3600
ReturnToService=2
JobCompType=jobcomp/filetxt
JobCompLoc=$place/jobs.txt
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
EOF
munged --force --key-file "$place/munge.key" --socket "$place/munge.socket" --pid-file "$place/munged.pid" --log-file "$place/munged.log" \
  --seed-file "$place/munged.seed"
slurmctld
slurmd
for _ in $(seq 30); do
  [ "$(sinfo -h -o %T 2>/dev/null)" = idle ] && break
  sleep 1
done
[ "$(sinfo -h -o %T)" = idle ] || { tail "$place"/*.log; echo "the node did not come up"; exit 1; }
sinfo

started=$SECONDS
"$python" -m advlab run "${notebooks[@]}" --profile smoke --on slurm -- --slurm-status-command squeue --latency-wait 20
echo "--- $((SECONDS - started)) s in all; Slurm's own record:"
sed -E 's/ (UserId|GroupId|Partition|ReservationName|Tres|Account|QOS|WcKey|Cluster|SubmitTime|EligibleTime|DerivedExitCode|NodeCnt)=[^ ]*//g' "$place/jobs.txt"
done=$(find "$ADVLAB_HOME/runs/smoke" -name '*.done' | wc -l)
jobs=$(grep -c 'JobState=COMPLETED' "$place/jobs.txt" || true)
[ "$done" -gt 0 ] && [ "$jobs" = "$done" ] || { echo "$done notebooks are done, $jobs jobs were completed by Slurm"; exit 1; }
"$python" -m advlab run "${notebooks[@]}" --profile smoke --dry-run | tee "$place/dry"
grep -q "nothing to do" "$place/dry"  # one Snakefile: what Slurm ran is done on the spot too
echo "$jobs notebooks ran as Slurm jobs"
