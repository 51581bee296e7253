# Sourced by the scripts beside it: their flags, and the one place where commands are run.
# shellcheck shell=bash disable=SC2154

dry_run='' training=()

# One line on stderr, and status 2.
fail() {
  echo "error: $*" >&2
  exit 2
}

# parse 'REQUIRED NAMES' 'OTHER NAMES' "$@": sets $NAME from --NAME=VALUE, to yes from a bare --NAME
# whose variable is 'no' so far, and `training` from what stands behind --.
parse() {
  local required=$1 names="$1 $2" flag key
  shift 2
  while (($#)); do
    flag=$1 && shift
    key=${flag%%=*} && key=${key#--}
    case $flag in
      --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;;
      --dry_run) dry_run=yes ;;
      --) training=("$@") && break ;;
      --?*)
        [[ $key != *' '* && " $names " == *" $key "* ]] ||
          fail "--$key is not a flag of ${0##*/}; there are --${names// / --}, --dry_run, --help"
        if [[ $flag == "--$key" && ${!key} =~ ^(no|yes)$ ]]; then
          printf -v "$key" yes
        else
          [[ $flag == *=?* ]] || fail "--$key needs a value: --$key=VALUE"
          [[ ${!key} != no ]] || fail "--$key takes no value, got $flag"
          printf -v "$key" '%s' "${flag#*=}"
        fi
        ;;
      *) fail "expected --NAME=VALUE, got $flag; flags of the training stand behind --" ;;
    esac
  done
  for key in $required; do
    [[ ${!key} ]] || fail "--$key=VALUE is missing (see ${0##*/} --help)"
  done
  check_training
}

# Checks what all jobs have: $name, $model_dir and the flags of the training.
check_training() {
  local flag has_file=''
  [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "--name should be up to 40 small letters, digits and -, beginning with a letter, got $name"
  for flag in "${training[@]}"; do
    case $flag in
      --gin_file=?*) has_file=yes ;;
      --gin.MODEL_DIR*) fail "give --model_dir=$model_dir alone, not --gin.MODEL_DIR too" ;;
      *$'\n'*) fail 'a flag of the training has a line break: put it into a gin file' ;;
    esac
  done
  [[ $has_file ]] || fail 'the training has no --gin_file=FILE; its flags stand behind --'
}

# The results of a job on a machine that goes have to go elsewhere.
check_bucket() {
  [[ $model_dir =~ ^gs://[a-z0-9][-_.a-z0-9]*/[^[:space:]]+$ ]] ||
    fail "--model_dir should be gs://BUCKET/FOLDER, got $model_dir"
}

# Runs a command, or prints it so that a shell reads it again.
run() {
  if [[ $dry_run ]]; then
    quoted "$@" && echo
  else
    "$@"
  fi
}

# What a command prints; nothing if it fails, and in a dry run.
ask() {
  [[ $dry_run ]] || "$@" 2>/dev/null || true
}

quoted() {
  local words
  printf -v words '%q ' "$@"
  printf '%s' "${words% }"
}
