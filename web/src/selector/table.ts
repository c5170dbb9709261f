/** What a selector's tree hits in the table: as `torchparams/_selector/candidates.py`. */
import type { Model } from '../model'
import { SelectorError } from './errors'
import { type Glob, globFromEnd, globMatcher, globSpells, literalOf } from './globs'
import { type Condition, type Node, parse, type Regex, type Word, write, writeCondition } from './parser'
import { compileRegex, TIME_LIMIT } from './regex'

/** Which rows: 1 for each that is hit. */
export type Mask = Uint8Array

export class Table {
  #places: Map<string, number> | null = null
  #numbers: Map<string, bigint[]> | null = null
  #spellings: { row: number; name: string; added: string[] | null }[] | null = null

  constructor(readonly model: Model) {}

  /** The rows that a text selects. Raises `SelectorError`. */
  select(text: string): Mask {
    return this.hits(parse(text, this.model.dtypes))
  }

  /** The text as the parser prints it. */
  canonical(text: string): string {
    return write(parse(text, this.model.dtypes))
  }

  hits(node: Node): Mask {
    const { size } = this.model
    switch (node.kind) {
      case 'union':
      case 'intersection': {
        const [first, ...rest] = node.terms.map((term) => this.hits(term))
        for (const other of rest) {
          for (let i = 0; i < size; i++) first[i] = node.kind === 'union' ? first[i] | other[i] : first[i] & other[i]
        }
        return first
      }
      case 'complement':
        return this.hits(node.term).map((hit) => 1 - hit)
      default: {
        const rows = node.pattern === null ? new Uint8Array(size).fill(1) : this.named(node.pattern)
        for (const condition of node.conditions) this.narrow(rows, condition)
        return rows
      }
    }
  }

  /** Every spelling of every name: canonical before raw before alias. */
  get places(): Map<string, number> {
    if (this.#places) return this.#places
    const found = new Map<string, number>()
    this.model.names.forEach((name, row) => found.has(name) || found.set(name, row))
    for (const [row, raw] of this.model.raws) if (!found.has(raw)) found.set(raw, row)
    for (const [row, alias] of this.model.aliases) if (!found.has(alias)) found.set(alias, row)
    this.#places = found
    return found
  }

  /** Aliases, and raw names with the components that wrappers added to them. */
  private get spellings(): { row: number; name: string; added: string[] | null }[] {
    this.#spellings ??= [
      ...this.model.aliases.map(([row, name]) => ({ row, name, added: null })),
      ...this.model.raws.map(([row, name]) => ({ row, name, added: added(name, this.model.names[row]) })),
    ]
    return this.#spellings
  }

  named(pattern: Glob | Regex): Mask {
    const rows = new Uint8Array(this.model.size)
    if (pattern.kind === 'glob') {
      const literal = literalOf(pattern)
      if (literal !== null) {
        const place = this.places.get(literal)
        if (place !== undefined) rows[place] = 1
        return rows
      }
    }
    const matches = pattern.kind === 'glob' ? this.globMatcher(pattern) : timed(compileRegex(pattern.pattern, 0))
    const spells = (text: string) =>
      pattern.kind === 'glob' ? globSpells(pattern, text) : pattern.pattern.includes(text)
    this.model.names.forEach((name, row) => {
      if (matches(name)) rows[row] = 1
    })
    for (const { row, name, added } of this.spellings) {
      if ((added === null || added.some(spells)) && matches(name)) rows[row] = 1
    }
    return rows
  }

  private globMatcher(glob: Glob): (name: string) => boolean {
    return globMatcher(glob, globFromEnd(glob) ? (module) => this.numbers.get(module) ?? [] : () => [])
  }

  /** Module → the numbers that its children are called by, sorted; under every spelling. */
  private get numbers(): Map<string, bigint[]> {
    if (this.#numbers) return this.#numbers
    const sets = new Map<string, Set<bigint>>()
    for (const name of this.places.keys()) {
      const parts = name.split('.')
      parts.forEach((part, at) => {
        if (!isNumber(part)) return
        const module = parts.slice(0, at).join('.')
        const known = sets.get(module) ?? new Set()
        sets.set(module, known.add(BigInt(part)))
      })
    }
    const sorted = [...sets].map(([module, set]): [string, bigint[]] => [
      module,
      [...set].sort((a, b) => (a < b ? -1 : 1)),
    ])
    this.#numbers = new Map(sorted)
    return this.#numbers
  }

  private narrow(rows: Mask, condition: Condition | Word): void {
    if (condition.kind === 'condition' && condition.field === 'name') {
      const named = this.named(condition.value as Glob)
      const wanted = condition.op === '=' ? 1 : 0
      for (let i = 0; i < rows.length; i++) if (named[i] !== wanted) rows[i] = 0
      return
    }
    this.refuseUnrecorded(condition)
    const holds = condition.kind === 'word' ? wordTest(this.model, condition.word) : comparison(this.model, condition)
    for (let i = 0; i < rows.length; i++) if (rows[i] && !holds(i)) rows[i] = 0
  }

  private refuseUnrecorded(condition: Condition | Word): void {
    const asked = condition.kind === 'word' ? condition.word : condition.field
    const { model } = this
    const owned: [boolean, string] = [model.module.words.every((word) => word === null), 'the class of the owner']
    const graded: [boolean, string] = [model.grad.words.every((word) => word === null), 'requires_grad']
    const told: [boolean, string] = [
      model.kind.words.every((word) => word === 'tensor'),
      'what is a parameter and what a buffer',
    ]
    const absent: Record<string, [boolean, string]> = {
      norm: owned, embedding: owned, module: owned, trainable: graded, frozen: graded, buffer: told,
    }
    const found = Object.hasOwn(absent, asked) && model.size ? absent[asked] : null
    if (found?.[0]) {
      throw new SelectorError(
        `\`${writeCondition(condition)}\` cannot be told, because ${found[1]} is not recorded`,
        0,
        '',
        'a file records name, shape and dtype',
      )
    }
  }
}

/** The same function, which gives up once the time limit is over. */
function timed(matches: (name: string) => boolean): (name: string) => boolean {
  const begun = performance.now()
  let calls = 0
  return (name) => {
    if (calls++ % 64 === 0 && performance.now() - begun > TIME_LIMIT) {
      throw new SelectorError(`the regular expression takes more than ${TIME_LIMIT / 1000} s`)
    }
    return matches(name)
  }
}

/** The components of `raw` that `name`, which is part of it in order, does not have. */
function added(raw: string, name: string): string[] {
  const parts = name.split('.')
  let at = 0
  return raw.split('.').filter((component) => {
    if (component !== parts[at]) return true
    at += 1
    return false
  })
}

/** Whether a component is a number as globs write it: without zeros in front, and of 64 bits. */
export function isNumber(component: string): boolean {
  return /^(0|[1-9][0-9]{0,17})$/.test(component)
}

export function layerOf(name: string): bigint | null {
  const found = name.split('.').find(isNumber)
  return found === undefined ? null : BigInt(found)
}

const compare: Record<string, (a: number | bigint, b: number | bigint) => boolean> = {
  '=': (a, b) => a == b, // eslint-disable-line eqeqeq -- of a number and a bigint
  '!=': (a, b) => a != b,
  '<': (a, b) => a < b,
  '<=': (a, b) => a <= b,
  '>': (a, b) => a > b,
  '>=': (a, b) => a >= b,
}

type Holds = (row: number) => boolean

function comparison(model: Model, { field, op, value }: Condition): Holds {
  const ordered: Record<string, (row: number) => number | bigint | null> = {
    ndim: (row) => model.shapeOf(row)?.length ?? null,
    numel: (row) => model.numel[row],
    nbytes: (row) => model.nbytes[row],
    bpw: (row) => (model.numel[row] ? (8 * model.nbytes[row]) / model.numel[row] : null),
    layer: (row) => layerOf(model.names[row]),
  }
  if (Object.hasOwn(ordered, field)) {
    return (row) => {
      const found = ordered[field](row)
      return found === null ? op === '!=' : compare[op](found, value as bigint | number)
    }
  }
  const equal = equality(model, field, value)
  return op === '=' ? equal : (row) => !equal(row)
}

function equality(model: Model, field: string, value: Condition['value']): Holds {
  switch (field) {
    case 'module': {
      const matches = globMatcher(value as Glob, () => [])
      return ofClass(model, (cls) => classSpellings(cls).some(matches))
    }
    case 'shape': {
      const wanted = value as (bigint | null)[] | null
      return (row) => {
        const shape = model.shapeOf(row)
        if (shape === null || wanted === null) return shape === wanted
        return shape.length === wanted.length && shape.every((size, i) => wanted[i] === null || BigInt(size) === wanted[i])
      }
    }
    case 'encoding': {
      const pieces = (value as string).split('*')
      return (row) => {
        const encoding = model.encodingOf(row)
        return encoding !== null && fitsStars(pieces, encoding)
      }
    }
    case 'device': {
      const wanted = value as string
      return (row) => {
        const device = model.device.at(row) as string
        return (wanted.includes(':') ? device : device.split(':')[0]) === wanted
      }
    }
    case 'dtype':
      return (row) => model.dtypeOf(row) === value
    default:
      return (row) => model.kind.at(row) === value
  }
}

/** Whether a text is these pieces with any characters between them. */
function fitsStars(pieces: string[], text: string): boolean {
  const [first, ...rest] = pieces
  if (!rest.length) return text === first
  if (!text.startsWith(first)) return false
  let at = first.length
  const last = rest.pop()!
  for (const piece of rest) {
    const found = text.indexOf(piece, at)
    if (found < 0) return false
    at = found + piece.length
  }
  return text.length - last.length >= at && text.endsWith(last)
}

function classSpellings(qualified: string): string[] {
  const short = qualified.slice(qualified.lastIndexOf('.') + 1)
  return qualified.startsWith('torch.nn.modules.') ? [qualified, short, `torch.nn.${short}`] : [qualified, short]
}

/** Whether the owner's class or one of its bases fits, found out once for each class. */
function ofClass(model: Model, fits: (cls: string) => boolean): Holds {
  const known = new Map<string, boolean>()
  return (row) => {
    const module = model.module.at(row) as string | null
    const bases = (model.bases.at(row) as string[]) ?? []
    const key = [module, ...bases].join('\0')
    let found = known.get(key)
    if (found === undefined) {
      found = [...(module === null ? [] : [module]), ...bases].some(fits)
      known.set(key, found)
    }
    return found
  }
}

const isLayer = (cls: string) => !cls.startsWith('torch.nn.utils.')

export function isBias(name: string): boolean {
  const parts = name.split('.')
  let last = parts.at(-1)!
  if (last.startsWith('original') && parts.length > 2 && parts.at(-3) === 'parametrizations') last = parts.at(-2)!
  return ['bias', 'biases'].includes(last) || last.startsWith('bias_') || last.endsWith('_bias') || last.endsWith('_biases')
}

function wordTest(model: Model, word: string): Holds {
  switch (word) {
    case 'trainable':
      return (row) => model.grad.at(row) === true
    case 'frozen':
      return (row) => model.grad.at(row) === false && model.kind.at(row) !== 'buffer'
    case 'tied': {
      const tied = new Set(model.aliases.map(([row]) => row))
      return (row) => tied.has(row)
    }
    case 'buffer':
      return (row) => model.kind.at(row) === 'buffer'
    case 'bias':
      return (row) => isBias(model.names[row])
    case 'matrix':
      return (row) => (model.shapeOf(row)?.length ?? 0) >= 2
    case 'meta':
      return (row) => model.device.at(row) === 'meta'
    case 'quantized':
      return (row) => model.encodingOf(row) !== null
    case 'sharded':
      return (row) => model.sharded[row] === 1
    case 'norm':
      return ofClass(model, (cls) => isLayer(cls) && /Norm(?:Base|[123]d)?$/.test(cls))
    default:
      return ofClass(model, (cls) => isLayer(cls) && /Embedding(?:Bag)?$/.test(cls))
  }
}
