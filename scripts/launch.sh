# Sourced by every launcher, from the repository root. POSIX sh.
#
# RUN            how Python is started: one process, or torchrun for NUM_GPUS > 1 or any TORCHRUN_ARGS
# plain X        prints a number as folder names have it: 0.70 as 0.7, 8.0 as 8
# ipc_of X D     prints the images a class that the folder name X says (_ipc50_), else D
# unless N V D   prints _NV where the value V is not the default D: how folder names say what is not the default
#
# torchrun, not `accelerate launch`: the latter silently reads a per-user configuration file.

case "${NUM_GPUS:-1}" in
    *[!0-9]* | 0) echo "error: NUM_GPUS=$NUM_GPUS: expected a number of at least 1" >&2 && exit 2 ;;
esac
RUN="${PYTHON:-python}"
if [ -n "${TORCHRUN_ARGS:-}" ] || [ "${NUM_GPUS:-1}" -gt 1 ]; then
    RUN="torchrun ${TORCHRUN_ARGS:---standalone --nproc_per_node $NUM_GPUS}"
fi

unless() {
    [ "$2" = "$3" ] || printf '_%s%s' "$1" "$2"
}

plain() {
    printf '%g' "$1"
}

ipc_of() {
    case "$1" in
        *_ipc[1-9]*) set -- "${1#*_ipc}" && printf '%s' "${1%%[!0-9]*}" ;;
        *) printf '%s' "$2" ;;
    esac
}
