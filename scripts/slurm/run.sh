# Sourced by the sbatch files, from the repository root. POSIX sh.
#
# requeueing COMMAND
#     runs it and passes Slurm's warnings on to it as SIGTERM: the stage finishes its unit of work
#     and leaves. After SIGUSR1, the warning of the time limit, the job is put back into the queue,
#     where the same command goes on. SIGTERM is a scancel, which stays one, or a preemption, after
#     which Slurm itself puts the job back, as after a node's failure (--requeue).
# shard
#     prints "I/N" of this element of a job array, for stages 1-3. A part of an array (--array=1,3,
#     to make up for two elements that failed) does not say how many shards the whole run has:
#     SHARDS=4 does. A requeued element keeps its number.

shard() {
    count="${SLURM_ARRAY_TASK_COUNT:-1}"
    last=$((count - 1))
    if [ -z "${SHARDS:-}" ] && [ "${SLURM_ARRAY_TASK_MAX:-$last}" -ne $last ]; then
        echo "$count elements of an array up to $SLURM_ARRAY_TASK_MAX: set SHARDS to all of it" >&2
        exit 2
    fi
    echo "${SLURM_ARRAY_TASK_ID:-0}/${SHARDS:-$count}"
}

pass_on() {
    case "$1" in
        # the steps alone: srun itself takes a SIGTERM for "kill them"
        srun) scancel --signal=TERM "$SLURM_JOB_ID" || true ;;
        *) kill -TERM "$child" 2>/dev/null || true ;;
    esac
}

requeueing() {
    limit=""
    "$@" &
    child=$!
    trap 'limit=yes; pass_on "$1"' USR1
    trap 'pass_on "$1"' TERM
    status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends the wait, not the child
        status=0
        wait "$child" || status=$?
    done
    trap - USR1 TERM
    if [ "$status" -eq 0 ]; then
        return 0
    fi
    # 75: left after a finished unit, 143 before one. 2: refused, now and the next time
    if [ -n "$limit" ] && [ "$status" -ne 2 ]; then
        job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
        job="${job:-${SLURM_JOB_ID:-}}"
        echo "stopped with status $status; back into the queue" >&2
        if [ -n "$job" ]; then
            scontrol requeue "$job"
        fi
        exit 75
    fi
    exit "$status"
}
