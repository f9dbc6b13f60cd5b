#!/bin/sh
# Debian's Slurm, for the tests in tests/cluster. Where it cannot be installed they are skipped, so
# this never fails. Nothing is done when it is there, which takes no time.
set -u
PATH="$PATH:/usr/sbin:/sbin"

have() { for name; do command -v "$name" >/dev/null || return 1; done; }
give_up() { echo "Slurm's tests will be skipped: $1"; exit 0; }
install() { apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 "$@" >"$log" 2>&1; }

have slurmctld slurmd munged ip shellcheck zsh fish && exit 0
have apt-get || give_up "it is not installed, and there is no apt-get"
[ "$(id -u)" = 0 ] || give_up "it is not installed; as root: apt-get install slurm-wlm munge iproute2"

echo "installing Slurm for its tests, from Debian's packages: half a minute, once"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
policy=/usr/sbin/policy-rc.d
made=
# The packages would start their daemons; a test cluster has its own.
[ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && made=$policy; }
trap 'rm -f "$log" $made' EXIT
apt-get update -qq >"$log" 2>&1
install slurm-wlm munge iproute2 || { tail -3 "$log"; give_up "apt-get could not install it"; }
# For sacct, and to read the scripts; without them only their tests are skipped.
install slurmdbd mariadb-server || tail -3 "$log"
install shellcheck || tail -3 "$log"
# The shells whose completion is tried; bash is there.
install zsh fish || tail -3 "$log"
