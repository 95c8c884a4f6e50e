#!/bin/sh
# What only a GPU can show, in order of worth, in at most 9 minutes of one: the tests that need it, the
# four stages against the release's way at their real size, the whole pipeline at 512 px, stage 2 by batch
# size. Needs torch, torchvision, diffusers, transformers, scikit-learn and pytest, no data, no weights and
# no network. Every result is in $OUT as soon as it is there; a part that fails does not stop the next.
# On a CPU all of it runs at toy size in under 5 minutes.

case " $* " in *" --help "* | *" -h "*) sed -n '2,${/^#/!q;s/^# //;p;}' "$0" && exit ;; esac
PYTHON="${PYTHON:-python}"
OUT="${OUT:-output/gpu_check}"
cd "$(dirname "$(readlink -f "$0")")/.."
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1 PYTHONUNBUFFERED=1
failed=

# part NAME SECONDS COMMAND...: its output goes to $OUT/NAME.log too
part() {
    name="$1" seconds="$2"
    shift 2
    echo "== $name (at most $seconds s): $*"
    { timeout "$seconds" "$@" 2>&1; echo "status $?"; } | tee "$OUT/$name.log"
    [ "$(tail -n 1 "$OUT/$name.log")" = "status 0" ] || failed="$failed $name"
}

quick=
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || quick=--quick

part tests 100 "$PYTHON" -m pytest -m gpu tests/test_gpu.py
part benchmark 240 "$PYTHON" -m misc.benchmark $quick --out "$OUT"
part pipeline 90 "$PYTHON" -m misc.gpu_check pipeline --out "$OUT"
part sizes 110 "$PYTHON" -m misc.gpu_check sizes --out "$OUT"

[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
