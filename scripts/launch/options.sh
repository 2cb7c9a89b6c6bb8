# The launchers source this file. It reads --name=value options, and runs commands or prints them.
#
#   read_options "name= other_name= switch ..." "$@"    sets $option_name, ...; puts what follows -- into $arguments
#   need name ...                                       exits with a one-line error if an option is empty
#   run COMMAND...                                      runs it; with --dry_run, prints it as one would type it

root="$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
arguments=()
option_dry_run=""

wrong() {
  echo "error: $*" >&2
  exit 2
}

# Prints the comment at the top of the launcher.
show_help() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"
  exit 0
}

read_options() {
  local known=" $1 dry_run " name word
  shift
  for word in $known; do
    name="${word%=}"
    if [ -z "$(eval "echo \${option_$name:-}")" ]; then printf -v "option_$name" '%s' ""; fi
  done
  while [ $# -gt 0 ]; do
    word="$1"
    shift
    case "$word" in
      --)
        arguments=("$@")
        return
        ;;
      --help | -h) show_help ;;
      --*=*)
        name="${word%%=*}"
        name="${name#--}"
        case "$known" in *" $name= "*) ;; *" $name "*) wrong "--$name: takes no value" ;; *) unknown "$name" "$known" ;; esac
        # A line break would add a line of its own to a job's script.
        case "$word" in *[[:cntrl:]]*) wrong "--$name: must not contain line breaks or other control characters" ;; esac
        printf -v "option_$name" '%s' "${word#*=}"
        ;;
      --*)
        name="${word#--}"
        case "$known" in *" $name "*) ;; *" $name= "*) wrong "--$name: needs a value, --$name=VALUE" ;; *) unknown "$name" "$known" ;; esac
        printf -v "option_$name" '%s' "1"
        ;;
      *) wrong "unexpected argument '$word': options are written --name=value, and flags of the experiment follow --" ;;
    esac
  done
}

unknown() {
  local all="" word
  for word in $2; do all="$all --${word%=}"; done
  wrong "unknown option --$1 (flags of the experiment follow --); known:$all --help"
}

need() {
  local name
  for name in "$@"; do
    if [ -z "$(eval "echo \"\$option_$name\"")" ]; then wrong "--$name: must be given; --help shows an example"; fi
  done
}

need_number() {
  local name value
  for name in "$@"; do
    value="$(eval "echo \"\$option_$name\"")"
    case "$value" in '' | *[!0-9]* | 0*) wrong "--$name=$value: must be a positive whole number" ;; esac
  done
}

need_program() {
  if [ -z "$option_dry_run" ] && ! command -v "$1" >/dev/null 2>&1; then
    wrong "$1 is not installed; $2. --dry_run shows what would be run"
  fi
}

need_script() {
  if [ ! -f "$root/$option_script" ]; then wrong "--script=$option_script: no such file in $root"; fi
}

# Prints words as one line, quoted for the shell.
quoted() {
  local line="" word
  for word in "$@"; do
    # '=' and ',' need no quotes, but printf %q would add them
    case "$word" in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s' "$line"
}

run() {
  if [ -n "$option_dry_run" ]; then
    quoted "$@"
    echo
  else
    echo "[moe_jax] $(quoted "$@")" >&2
    "$@"
  fi
}

# Puts --NAME=VALUE in front of the experiment's flags, unless they contain --NAME.
experiment_flags() {
  local given=" ${arguments[*]+"${arguments[*]}"} " flag
  for flag in "$@"; do
    case "$given" in *" ${flag%%=*}="* | *" ${flag%%=*} "*) ;; *) arguments=("$flag" ${arguments[@]+"${arguments[@]}"}) ;; esac
  done
}
