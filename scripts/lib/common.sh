# shellcheck shell=bash
# What the scripts share: messages, packages, the virtual environment. Sourced, not run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
export ROOT

say() { printf '%s\n' "$*" >&2; }
die() {
    printf '%s: cannot %s\n' "$(basename "$0")" "$1" >&2
    shift
    for line in "$@"; do printf '  %s\n' "$line" >&2; done
    exit 1
}

need_root() {
    [ "$(id -u)" = 0 ] || die "go on without root" "run: sudo $0 $*"
}

# need_packages PACKAGE:REASON… — installs what dpkg does not know, saying what and why.
need_packages() {
    local missing=() entry
    command -v dpkg-query >/dev/null || die "install packages: this is no Debian" "install by hand: ${*%%:*}"
    for entry in "$@"; do
        if [ "$(dpkg-query -W -f '${db:Status-Status}' "${entry%%:*}" 2>/dev/null)" != installed ]; then
            say "installing ${entry%%:*} (${entry#*:})"
            missing+=("${entry%%:*}")
        fi
    done
    [ ${#missing[@]} = 0 ] && return
    [ "$(id -u)" = 0 ] || die "install ${missing[*]}" "run: sudo apt-get install ${missing[*]}"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null 2>&1 && return
    quietly "read the package lists" apt-get update -q
    quietly "install ${missing[*]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
}

# shellcheck disable=SC2034 # the scripts that source this use it
RUNTIME_PACKAGES=(
    "python3-venv:the virtual environment"
    "libseccomp2:the system call filter"
    "nftables:the network rules"
    "util-linux:setpriv and unshare"
    "ca-certificates:TLS to model providers"
)

# need_compiler PYTHON — python-prctl and hnswlib are built from source where no wheel of them is at hand.
need_compiler() {
    "$1" -c 'import hnswlib, prctl' 2>/dev/null && return
    "$1" -m pip install --disable-pip-version-check -q --dry-run --no-deps --only-binary :all: hnswlib python-prctl >/dev/null 2>&1 && return
    need_packages "python3-dev:headers to build hnswlib and python-prctl" "gcc:to build python-prctl" \
        "g++:to build hnswlib" "libcap-dev:to build python-prctl"
}

# readable_by_all PATH — whether an unprivileged user can reach and execute it.
readable_by_all() {
    local path
    path=$(readlink -f "$1") || return 1
    [ -e "$path" ] || return 1
    case $(stat -c %A "$path") in *x) ;; *) return 1 ;; esac
    while [ "$path" != / ]; do
        path=$(dirname "$path")
        case $(stat -c %A "$path") in *x | *t) ;; *) return 1 ;; esac
    done
}

# A Python of at least 3.11 that an unprivileged user can execute (a root user's own build under /root is not one).
choose_python() {
    local candidate
    for candidate in /usr/bin/python3 /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11 /usr/local/bin/python3 python3; do
        candidate=$(command -v "$candidate") || continue
        readable_by_all "$candidate" || continue
        "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        printf '%s\n' "$candidate"
        return
    done
    die "find a Python of at least 3.11 that an unprivileged user can execute" "apt-get install python3 python3-venv"
}

# quietly WHAT COMMAND… — runs it without its chatter; shows the end of that, and stops, when it fails.
quietly() {
    local what=$1 log
    shift
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        rm -f "$log"
        die "$what" "${1##*/} said the above"
    fi
    rm -f "$log"
}

# make_venv DIRECTORY EXTRA — the environment with agentd (editable) and its packages; nothing happens when it is as it should be.
make_venv() {
    local directory=$1 extra=$2 python stamp
    python=$(choose_python)
    stamp=$( (
        readlink -f "$python"
        echo "$extra $ROOT"
        cat "$ROOT/pyproject.toml"
    ) | sha256sum | cut -d' ' -f1)
    [ "$(cat "$directory/.agentd-stamp" 2>/dev/null)" = "$stamp" ] && return
    say "building the virtual environment with $python (a minute or two the first time)"
    if ! { [ -x "$directory/bin/python" ] && [ "$(readlink -f "$directory/bin/python")" = "$(readlink -f "$python")" ]; }; then
        rm -rf "$directory"
        quietly "make a virtual environment" "$python" -m venv "$directory"
    fi
    need_compiler "$directory/bin/python"
    quietly "install agentd's Python packages" "$directory/bin/python" -m pip install --disable-pip-version-check -q -e "$ROOT$extra"
    printf '%s\n' "$stamp" >"$directory/.agentd-stamp"
}
