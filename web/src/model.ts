/** The tensors, their columns, and where each stands: its stack of layers, its layer, its role. */
import { type Finding, type Numbers, type Payload, type Source, type Statistics, unpack, Words } from './payload'
import { isNumber } from './selector/table'
import { Steps } from './steps'

export interface Histogram {
  low: number
  high: number
  counts: Numbers
  below: number
  above: number
}
export interface Octaves {
  first: number
  negative: Numbers
  positive: Numbers
}

/** Columns of statistics of one target; each array is made when it is first asked for. */
export class Columns {
  #known = new Map<string, Numbers>()
  #offsets: Float64Array | null = null

  constructor(readonly form: Statistics) {}

  has(key: string): boolean {
    return this.form[key] !== undefined && this.form[key] !== null
  }

  get(key: string): Numbers {
    let found = this.#known.get(key)
    if (!found) {
      const parts = key.split('.')
      let at: unknown = this.form
      for (const part of parts) at = (at as Record<string, unknown>)[part]
      this.#known.set(key, (found = unpack(at as never)))
    }
    return found
  }

  read(row: number): boolean {
    return this.has('read') && this.get('read')[row] === 1
  }

  histogram(row: number): Histogram | null {
    if (!this.read(row)) return null
    const { bins } = this.form.histogram
    const low = this.get('histogram.low')[row]
    let counts = this.get('histogram.counts').subarray(row * bins, (row + 1) * bins)
    if (Number.isNaN(low)) return null
    // Few values in many intervals are a comb: neighbours are put together.
    const wanted = Math.max(8, 2 * Math.sqrt(this.get('values')[row]))
    while (counts.length > wanted && counts.length % 2 === 0) {
      const halved = new Float64Array(counts.length / 2)
      for (let i = 0; i < halved.length; i++) halved[i] = counts[2 * i] + counts[2 * i + 1]
      counts = halved
    }
    return {
      low,
      high: this.get('histogram.high')[row],
      counts,
      below: this.get('histogram.below')[row],
      above: this.get('histogram.above')[row],
    }
  }

  octaves(row: number): Octaves | null {
    if (!this.has('octaves') || !this.read(row)) return null
    const lengths = this.get('octaves.lengths')
    if (!this.#offsets) {
      this.#offsets = new Float64Array(lengths.length + 1)
      for (let i = 0; i < lengths.length; i++) this.#offsets[i + 1] = this.#offsets[i] + lengths[i]
    }
    const [from, to] = [this.#offsets[row], this.#offsets[row + 1]]
    return {
      first: this.get('octaves.first')[row],
      negative: this.get('octaves.negative').subarray(from, to),
      positive: this.get('octaves.positive').subarray(from, to),
    }
  }

  /** Pairs of share and value, of the finite values. */
  quantiles(row: number): [number, number][] {
    const { at } = this.form.quantiles
    const values = this.get('quantiles.values').subarray(row * at.length, (row + 1) * at.length)
    return at.map((q, i): [number, number] => [q, values[i]])
  }

  quantile(row: number, q: number): number {
    const i = this.form.quantiles.at.findIndex((each) => Math.abs(each - q) < 1e-9)
    return i < 0 ? NaN : this.get('quantiles.values')[row * this.form.quantiles.at.length + i]
  }
}

/** Tensors whose names are alike but for the number of a layer. */
export interface Stack {
  title: string
  /** Texts of the layers, in order. */
  layers: string[]
  roles: string[]
  /** layer × role → rows of the tensors there. */
  cells: Map<number, number[]>
  /** Whether its rows are layers; else they are modules. */
  numbered: boolean
}

export interface Spot {
  stack: number
  layer: number
  role: number
}

const DIFFERENT = 40 // roles from which on numbers within them are folded

export class Model {
  readonly size: number
  readonly names: string[]
  readonly numel: Numbers
  readonly nbytes: Numbers
  readonly shapes: Words<number[] | null>
  readonly dtype: Words<string>
  readonly kind: Words<string>
  readonly device: Words<string>
  readonly grad: Words<boolean | null>
  readonly encoding: Words<string | null>
  readonly module: Words<string | null>
  readonly bases: Words<string[]>
  readonly file: Words<string | null>
  readonly sharded: Numbers
  readonly layout: Words<string | null>
  readonly aliases: [number, string][]
  readonly raws: [number, string][]
  readonly dtypes: Record<string, string>
  readonly source: Source
  readonly other: Source | null
  readonly a: Columns
  /** The numbers over the steps of a training; null in other reports. */
  readonly over: Steps | null
  readonly b: Columns | null
  readonly difference: Columns | null
  readonly status: Words<string> | null
  readonly findings: Finding[]
  /** Row → its findings, with the reason of each, and its step in a report over steps. */
  readonly flagged = new Map<number, [Finding, string, number?][]>()
  readonly stacks: Stack[]
  readonly spots: Spot[]

  constructor(readonly payload: Payload) {
    const { table } = payload
    this.names = table.names
    this.size = table.names.length
    this.numel = unpack(table.numel)
    this.nbytes = unpack(table.nbytes)
    this.shapes = Words.from(table.shape)
    this.dtype = Words.from(table.dtype)
    this.kind = Words.from(table.kind)
    this.device = Words.from(table.device)
    this.grad = Words.from(table.grad)
    this.encoding = Words.from(table.encoding)
    this.module = Words.from(table.module)
    this.bases = Words.from(table.bases)
    this.file = Words.from(table.file)
    this.sharded = unpack(table.sharded)
    this.layout = Words.from(table.layout)
    this.aliases = Object.entries(table.aliases).flatMap(([row, names]) =>
      names.map((name): [number, string] => [Number(row), name]),
    )
    this.raws = Object.entries(table.raw).map(([row, name]): [number, string] => [Number(row), name])
    this.dtypes = Object.assign(Object.create(null), payload.dtypes)
    this.source = payload.source
    this.other = payload.other ?? null
    this.a = new Columns(payload.a ?? ({} as Statistics))
    this.over = payload.history ? new Steps(payload.history, this.size) : null
    this.b = payload.b ? new Columns(payload.b) : null
    this.difference = payload.difference ? new Columns(payload.difference as never) : null
    this.status = payload.difference ? Words.from(payload.difference.status as never) : null
    this.findings = payload.findings
    for (const finding of this.findings) {
      for (const [row, reason, step] of finding.items) {
        const known = this.flagged.get(row)
        if (known) known.push([finding, reason, step])
        else this.flagged.set(row, [[finding, reason, step]])
      }
    }
    ;[this.stacks, this.spots] = stacksOf(this.names)
  }

  shapeOf(row: number): number[] | null {
    return this.shapes.at(row)
  }

  dtypeOf(row: number): string {
    return this.dtype.at(row)
  }

  encodingOf(row: number): string | null {
    return this.encoding.at(row)
  }

  /** Dtype and encoding, as one word. */
  typeOf(row: number): string {
    return this.encoding.at(row) ?? this.dtype.at(row)
  }

  /** Why the values of a tensor are not here; empty where they are. */
  unread(row: number): string {
    return this.payload.unread[String(row)] ?? this.payload.difference?.reasons[String(row)] ?? ''
  }

  /** Rows of the same role, in the order of the layers. */
  siblings(row: number): number[] {
    const { stack, role } = this.spots[row]
    const { layers, cells, roles } = this.stacks[stack]
    if (!this.stacks[stack].numbered) return [row]
    const found: number[] = []
    const within = cells.get(this.spots[row].layer * roles.length + role)!.indexOf(row)
    for (let layer = 0; layer < layers.length; layer++) {
      const rows = cells.get(layer * roles.length + role)
      if (rows && within < rows.length) found.push(rows[within])
    }
    return found
  }
}

interface Placed {
  title: string
  layer: string
  role: string
}

/** Where a name stands: the stack up to its first number, the layer, and the rest. */
function placed(name: string): Placed | null {
  for (let start = 0, stop = name.indexOf('.'); stop >= 0; start = stop + 1, stop = name.indexOf('.', start)) {
    const code = name.charCodeAt(start)
    if (code < 48 || code > 57) continue // most components begin with a letter
    const layer = name.slice(start, stop)
    if (isNumber(layer)) return { title: start ? name.slice(0, start - 1) : '', layer, role: name.slice(stop + 1) }
  }
  return null
}

/** The same function, which remembers what it said. */
function remembering<T>(find: (text: string) => T): (text: string) => T {
  const known = new Map<string, T>()
  return (text) => {
    let found = known.get(text)
    if (found === undefined) known.set(text, (found = find(text)))
    return found
  }
}

/** A role with a block of its own in front, and no expert: `blocks.3.attn.weight`. */
const nestedIn = remembering((role) => {
  const found = /^([^.]+)\.(0|[1-9][0-9]*)\.(.+)$/.exec(role)
  return found && !/expert/i.test(found[1]) ? found : false
})
const folded = remembering((role) => role.replace(/(^|\.)\d+(?=\.|$)/g, '$1*'))

function stacksOf(names: string[]): [Stack[], Spot[]] {
  const places = names.map(placed)
  const members = new Map<string, number[]>()
  places.forEach((place, row) => {
    if (!place) return
    const known = members.get(place.title)
    if (known) known.push(row)
    else members.set(place.title, [row])
  })
  const rest: number[] = []
  let groups: [string, number[]][] = []
  const inStack = new Set<number>()
  for (const [title, rows] of members) {
    // Numbers of which each has something else below it are no layers: fc.0.weight beside fc.1.running_mean.
    if (new Set(rows.map((row) => places[row]!.layer)).size < 2) continue
    groups.push([title, rows])
    for (const row of rows) inStack.add(row)
    if (rows.filter((row) => nestedIn(places[row]!.role)).length < 0.8 * rows.length) continue
    for (const row of rows) {
      const place = places[row]!
      const block = nestedIn(place.role)
      if (!block) continue
      place.layer += `.${block[1]}.${block[2]}`
      place.role = block[3]
    }
  }
  names.forEach((_, row) => inStack.has(row) || rest.push(row))
  groups = together(groups, places)
  const spots: Spot[] = new Array(names.length)
  const stacks: Stack[] = groups.map(([title, rows], i) => {
    const exact = new Set(rows.map((row) => places[row]!.role))
    const fold = exact.size > DIFFERENT
    const role = (row: number) => (fold ? folded(places[row]!.role) : places[row]!.role)
    return built(title, rows, (row) => places[row]!.layer, role, i, spots, true)
  })
  if (rest.length) {
    const module = (row: number) => names[row].slice(0, Math.max(names[row].lastIndexOf('.'), 0))
    const leaf = (row: number) => names[row].slice(names[row].lastIndexOf('.') + 1)
    stacks.push(built('', rest, module, leaf, stacks.length, spots, false))
  }
  return [stacks, spots]
}

/** Stacks whose titles differ by a number at the end, and that share most roles, as one: layer1, layer2, layer3. */
function together(groups: [string, number[]][], places: (Placed | null)[]): [string, number[]][] {
  const alike = new Map<string, [string, number[]][]>()
  for (const group of groups) {
    const key = group[0].replace(/\d+$/, '*')
    alike.set(key, [...(alike.get(key) ?? []), group])
  }
  return [...alike].flatMap(([key, some]): [string, number[]][] => {
    const roles = some.map(([, rows]) => new Set(rows.map((row) => places[row]!.role)))
    const shared = [...roles[0]].filter((role) => roles.every((other) => other.has(role))).length
    if (some.length < 2 || shared < 0.5 * Math.max(...roles.map((each) => each.size))) return some
    for (const [title, rows] of some) {
      const last = title.slice(title.lastIndexOf('.') + 1)
      for (const row of rows) places[row]!.layer = `${last}.${places[row]!.layer}`
    }
    return [[key, some.flatMap(([, rows]) => rows)]]
  })
}

function built(
  title: string,
  rows: number[],
  layerOf: (row: number) => string,
  roleOf: (row: number) => string,
  stack: number,
  spots: Spot[],
  numbered: boolean,
): Stack {
  const layers = new Map<string, number>()
  const roles = new Map<string, number>()
  const pairs = rows.map((row): [string, string] => [layerOf(row), roleOf(row)])
  for (const [layer, role] of pairs) {
    layers.set(layer, 0)
    roles.set(role, 0)
  }
  const sorted = numbered ? [...layers.keys()].sort(naturally) : [...layers.keys()]
  sorted.forEach((layer, i) => layers.set(layer, i))
  ;[...roles.keys()].forEach((role, i) => roles.set(role, i))
  const cells = new Map<number, number[]>()
  rows.forEach((row, i) => {
    const layer = layers.get(pairs[i][0])!
    const role = roles.get(pairs[i][1])!
    spots[row] = { stack, layer, role }
    const key = layer * roles.size + role
    const known = cells.get(key)
    if (known) known.push(row)
    else cells.set(key, [row])
  })
  return { title, layers: sorted, roles: [...roles.keys()], cells, numbered }
}

const collator = new Intl.Collator('en', { numeric: true })

export function naturally(a: string, b: string): number {
  return collator.compare(a, b)
}
