/** The data as Python embeds it: see `torchparams/page/payload.py`. */

export interface Packed {
  type: 'u1' | 'u2' | 'u4' | 'i2' | 'f4' | 'f8'
  data: string
}
export interface PackedWords {
  words: unknown[]
  of: Packed
}
export interface Item extends Array<unknown> {
  0: number
  1: string
}
export interface Finding {
  from: 'stats' | 'audit' | 'record'
  id: string
  severity: 'error' | 'warning' | 'note'
  title: string
  count: number
  /** Row, reason, and in a report over steps, the step. */
  items: [number, string, number?][]
  what?: string
  why?: string
  fix?: string
  where?: string
  names?: string[]
}
export interface Source {
  label: string
  format: string
  selector: string | null
  live: boolean
  detailed: boolean
  metadata: [string, string][]
  tensors: number
  numel: number
  nbytes: number
  left_out: { name: string; kind: string; reason: string }[]
  lost: number
}
export interface Statistics {
  [key: string]: unknown
  quantiles: { at: number[]; values: Packed }
  histogram: {
    bins: number
    reach: number
    clipped: boolean
    low: Packed
    high: Packed
    below: Packed
    above: Packed
    counts: Packed
  }
  octaves: { first: Packed; lengths: Packed; negative: Packed; positive: Packed } | null
}
export interface Picture {
  rows: number
  columns: number
  down: number
  across: number
  min: Packed
  max: Packed
  rms: Packed
  nonfinite: Packed
}
export interface Spectrum {
  /** Singular values, descending; null where they are estimated. */
  values: Packed | null
  spectral_norm: number | null
  nuclear_norm: number | null
  stable_rank: number | null
  effective_rank: number | null
  rank: number | null
  condition: number | null
  is_bound: boolean
  tail_exponent: number | null
  tail_distance: number | null
  edge: number | null
  spikes: number | null
  errors: Record<string, number | null>
}
/** A number that was logged over the steps. */
export interface Logged {
  name: string
  /** How many were logged; `steps` and `values` may hold fewer. */
  count: number
  steps: Packed
  values: Packed
}
/** The numbers of a training over its steps. */
export interface History {
  steps: Packed
  /** Steps × tensors; NaN where a step has none. */
  columns: Record<string, Packed>
  numbers: Logged[]
  notes: string[]
}
export interface Payload {
  version: number
  source: Source
  other?: Source
  rename?: string | null
  dtypes: Record<string, string>
  table: {
    names: string[]
    shape: PackedWords
    dtype: PackedWords
    numel: Packed
    nbytes: Packed
    kind: PackedWords
    device: PackedWords
    grad: PackedWords
    encoding: PackedWords
    module: PackedWords
    bases: PackedWords
    layout: PackedWords
    file: PackedWords
    sharded: Packed
    aliases: Record<string, string[]>
    raw: Record<string, string>
  }
  /** Left out in a report over steps. */
  a?: Statistics
  b?: Statistics
  difference?: Record<string, unknown> & { reasons: Record<string, string> }
  unread: Record<string, string>
  findings: Finding[]
  spectra: Record<string, Spectrum>
  pictures: Record<string, Picture>
  history?: History
}

export type Numbers = Uint8Array | Uint16Array | Uint32Array | Int16Array | Float32Array | Float64Array

const ARRAYS = {
  u1: Uint8Array,
  u2: Uint16Array,
  u4: Uint32Array,
  i2: Int16Array,
  f4: Float32Array,
  f8: Float64Array,
}

/** The numbers of a packed array. */
export function unpack({ type, data }: Packed): Numbers {
  const fast = (Uint8Array as unknown as { fromBase64?: (text: string) => Uint8Array }).fromBase64
  let bytes: Uint8Array
  if (fast) {
    bytes = fast.call(Uint8Array, data)
  } else {
    const text = atob(data)
    bytes = new Uint8Array(text.length)
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i)
  }
  return new ARRAYS[type](bytes.buffer as ArrayBuffer)
}

/** A column of which few values are different. */
export class Words<T = unknown> {
  readonly of: Numbers

  constructor(
    readonly words: T[],
    of: Packed,
  ) {
    this.of = unpack(of)
  }

  static from<T>({ words, of }: PackedWords): Words<T> {
    return new Words(words as T[], of)
  }

  at(row: number): T {
    return this.words[this.of[row]]
  }
}
