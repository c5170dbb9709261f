/** The parser: text → tree. The same language as `torchparams/_selector/parser.py`, with the same columns in errors. */
import { SelectorError } from './errors'
import { type Glob, globFromEnd, isSpace, NESTING, readGlob, startsGlob, writeGlob } from './globs'
import { compileRegex } from './regex'

export type Value = bigint | number | string | Glob | (bigint | null)[] | null
export interface Condition {
  kind: 'condition'
  field: string
  op: string
  value: Value
  text: string
}
export interface Word {
  kind: 'word'
  word: string
}
export interface Regex {
  kind: 'regex'
  pattern: string
}
export interface Compound {
  kind: 'compound'
  pattern: Glob | Regex | null
  conditions: (Condition | Word)[]
}
export type Node = Compound | { kind: 'union' | 'intersection'; terms: Node[] } | { kind: 'complement'; term: Node }

export const WORDS = [
  'trainable', 'frozen', 'tied', 'buffer', 'bias', 'norm', 'embedding', 'matrix', 'meta', 'quantized',
  'sharded',
]
export const ORDERED = ['ndim', 'numel', 'nbytes', 'bpw', 'layer']
export const FIELDS = [
  'name', 'shape', 'ndim', 'numel', 'nbytes', 'dtype', 'device', 'kind', 'module', 'layer', 'encoding', 'bpw',
]
const KINDS = ['parameter', 'buffer', 'tensor']
const OPERATORS = ['=', '!=', '<', '<=', '>', '>=']
const UNITS: Record<string, bigint> = { '': 1n }
;['K', 'M', 'G', 'T'].forEach((unit, power) => {
  UNITS[unit] = 1000n ** BigInt(power + 1)
  UNITS[`${unit}iB`] = 1024n ** BigInt(power + 1)
})

const JOINS: Record<string, string> = {
  and: 'an intersection is written `a & b`',
  or: 'a union is written `a | b`',
  not: 'a complement is written `~a`, a difference `a & ~b`',
  ',': 'a union is written `a | b`',
  ';': 'a union is written `a | b`',
  '+': 'a union is written `a | b`',
  '-': 'a difference is written `a & ~b`',
  '!': 'a complement is written `~a`, a difference `a & ~b`',
  '~': 'a difference is written `a & ~b`',
  '=': 'a condition stands in brackets: [dtype=bf16]',
  '<': 'a condition stands in brackets: [ndim<2]',
  '>': 'a condition stands in brackets: [ndim>2]',
}
const EXAMPLES: Record<string, string> = {
  shape: '[shape=64x3x7x7], with * for any size; [shape=()] is a scalar\'s',
  ndim: '[ndim>=2]',
  numel: '[numel>=1M]',
  nbytes: '[nbytes>=1MiB]',
  layer: '[layer>=4]',
  dtype: '[dtype=bf16]',
  device: '[device=cuda] or [device=cuda:0]',
  kind: '[kind=buffer]',
  encoding: '[encoding=nf4], with * for any characters: [encoding=gptq-*]',
  bpw: '[bpw<=4.5]',
}

/** The tree of a selector's text. `dtypes` maps every spelling of an element type to its name. */
export function parse(text: string, dtypes: Record<string, string>): Node {
  return new Parser(text, dtypes).whole()
}

class Parser {
  readonly chars: string[]
  at = 0

  constructor(
    readonly text: string,
    readonly dtypes: Record<string, string>,
  ) {
    this.chars = Array.from(text)
  }

  peek(): string {
    return this.chars[this.at] ?? ''
  }

  blanks(): string {
    while (this.peek() && isSpace(this.peek())) this.at += 1
    return this.peek()
  }

  fail(expected: string, hint = '', at = this.at): never {
    const char = this.chars[at]
    const found = at >= this.chars.length ? 'the end' : `“${char}”`
    throw new SelectorError(`expected ${expected}, found ${found}`, at + 1, expected, hint)
  }

  /** What a pattern matches from here on. */
  match(pattern: RegExp): string | null {
    const found = pattern.exec(this.chars.slice(this.at).join(''))
    return found ? found[0] : null
  }

  whole(): Node {
    if (!this.blanks()) this.fail('a selector', 'every parameter is `**`', 0)
    const node = this.union(0)
    if (this.peek()) this.stray('`|`, `&` or the end')
    return node
  }

  union(depth: number): Node {
    return this.joined('union', '|', () => this.intersection(depth))
  }

  intersection(depth: number): Node {
    return this.joined('intersection', '&', () => this.unary(depth))
  }

  joined(kind: 'union' | 'intersection', sign: string, next: () => Node): Node {
    const terms = [next()]
    while (this.peek() === sign) {
      this.at += 1
      if (this.peek() === sign) {
        this.fail('a selector', `one \`${sign}\` is enough: the ${kind} is \`a ${sign} b\``)
      }
      terms.push(next())
    }
    const flat = terms.flatMap((term) => (term.kind === kind ? term.terms : [term]))
    return flat.length > 1 ? { kind, terms: flat } : flat[0]
  }

  unary(depth: number): Node {
    let complements = 0
    while (this.blanks() === '~') {
      complements += 1
      this.shallow(depth + complements)
      this.at += 1
    }
    let node: Node = this.peek() === '(' ? this.parenthesis(depth + complements + 1) : this.compound()
    for (; complements; complements--) node = { kind: 'complement', term: node }
    return node
  }

  shallow(depth: number): void {
    if (depth > NESTING) this.fail(`at most ${NESTING} levels of \`(\` and \`~\``)
  }

  parenthesis(depth: number): Node {
    const opening = this.at
    this.shallow(depth)
    this.at += 1
    if (this.blanks() === ')') this.fail('a selector', 'every parameter is `**`')
    const node = this.union(depth)
    if (!this.peek()) this.fail('`)`', `the parenthesis at column ${opening + 1} is not closed`)
    if (this.peek() !== ')') this.stray('`|`, `&` or `)`')
    this.at += 1
    if (this.peek() === '[' || this.peek() === ':') {
      const rest = this.chars.slice(this.at).join('')
      this.fail('`|`, `&` or the end', `join them with \`&\`: (…) & ${rest}`)
    }
    this.blanks()
    return node
  }

  compound(): Compound {
    const start = this.at
    const char = this.peek()
    let pattern: Glob | Regex | null = null
    if (char === '/') pattern = this.regex()
    else if (char === '.' || startsGlob(char)) [pattern, this.at] = readGlob(this.chars, this.at)
    const conditions: (Condition | Word)[] = []
    while (this.peek() === '[' || this.peek() === ':') {
      conditions.push(this.peek() === '[' ? this.condition() : this.word())
    }
    if (this.at === start) this.noTerm()
    this.blanks()
    return { kind: 'compound', pattern, conditions }
  }

  noTerm(): never {
    const char = this.peek()
    let hint = JOINS[char] ?? ''
    if (char === ')') hint = 'no parenthesis is open here'
    else if (char === ']') hint = 'no bracket is open here'
    else if (char === '|' || char === '&') hint = `\`${char}\` stands between two selectors`
    else if (char === '}') hint = 'no brace is open here'
    this.fail('a selector', hint)
  }

  stray(expected: string): never {
    const char = this.peek()
    const word = this.match(/^[\p{L}\p{N}_]+/u)?.toLowerCase()
    const before = this.chars.slice(0, this.at).join('').trimEnd().split(/[\s(|&~]+/).at(-1) ?? ''
    let hint = ''
    if (word && Object.hasOwn(JOINS, word)) hint = JOINS[word]
    else if (['not', 'and', 'or'].includes(before)) hint = JOINS[before]
    else if (char === ')') hint = 'no parenthesis is open here'
    else if (char === ']' || char === '}') hint = `no ${char === ']' ? 'bracket' : 'brace'} is open here`
    else if (Object.hasOwn(JOINS, char)) hint = JOINS[char]
    else if (isSpace(this.chars[this.at - 1])) hint = 'two terms are joined by `|` or `&`; a name with a blank is quoted'
    else if (char === '(') hint = 'two terms are joined by `|` or `&`'
    this.fail(expected, hint)
  }

  regex(): Regex {
    const opening = this.at
    this.at += 1
    for (let char = this.peek(); char !== '/'; char = this.peek()) {
      if (!char) this.fail('a closing `/`', `the regular expression at column ${opening + 1} is not closed`)
      this.at = Math.min(this.at + (char === '\\' ? 2 : 1), this.chars.length)
    }
    const pattern = this.chars.slice(opening + 1, this.at)
    if (!pattern.length) this.fail('a regular expression', 'the empty name is ""')
    this.at += 1
    compileRegex(pattern.join(''), opening + 1)
    if (this.match(/^[\p{L}\p{N}_]+/u)) {
      this.fail('`[`, `:`, `|`, `&` or the end', 'the page knows no flags')
    }
    return { kind: 'regex', pattern: pattern.join('') }
  }

  word(): Word {
    this.at += 1
    const found = this.match(/^[\p{L}\p{N}_]+/u)
    if (found === null) this.fail(`a word: ${WORDS.join(', ')}`, 'a name with a colon in it is quoted: "a:b"')
    if (!WORDS.includes(found)) {
      const hint = FIELDS.includes(found) ? `${found} is a field: write [${found}=…]` : ''
      this.fail(`a word (${WORDS.join(', ')})`, hint)
    }
    this.at += found.length
    return { kind: 'word', word: found }
  }

  condition(): Condition {
    const opening = this.at
    this.at += 1
    this.blanks()
    const field = this.field()
    this.blanks()
    const op = this.operator(field)
    this.blanks()
    const [value, text] = this.value(field, opening)
    if (this.blanks() !== ']') {
      this.fail('`]`', this.peek() ? '' : `the bracket at column ${opening + 1} is not closed`)
    }
    this.at += 1
    return { kind: 'condition', field, op, value, text }
  }

  field(): string {
    const found = this.match(/^[\p{L}_][\p{L}\p{N}_]*/u)
    if (found === null) {
      const hint = /[0-9]/.test(this.peek()) ? 'an index is a component of its own, after a dot: layer.0' : ''
      this.fail(`a field: ${FIELDS.join(', ')}`, hint)
    }
    if (!FIELDS.includes(found)) {
      this.fail(`a field (${FIELDS.join(', ')})`, WORDS.includes(found) ? `${found} is a word: write :${found}` : '')
    }
    this.at += found.length
    return found
  }

  operator(field: string): string {
    let op = this.match(/^[=!<>~^$*:|]+/) ?? ''
    const allowed = ORDERED.includes(field) ? OPERATORS : OPERATORS.slice(0, 2)
    if (['name', 'module', 'shape'].includes(field) && allowed.includes(op.replace(/\*+$/, ''))) {
      op = op.replace(/\*+$/, '') // the stars begin the value
    }
    if (!allowed.includes(op)) {
      const hint = OPERATORS.includes(op) ? `${field} has no order; ${ORDERED.join(', ')} have one` : ''
      this.fail(`one of ${allowed.join(' ')}`, hint)
    }
    this.at += op.length
    return op
  }

  value(field: string, opening: number): [Value, string] {
    const start = this.at
    if (field === 'name' || field === 'module') {
      if (this.peek() === '/') this.fail('a glob', 'a regular expression is a term of its own: /.*bias/')
      if (this.peek() === '' || this.peek() === ']') {
        this.fail('a glob', field === 'name' ? '[name=**.bias]' : '[module=*Norm]')
      }
      const [glob, end] = readGlob(this.chars, this.at)
      this.at = end
      if (field === 'module' && globFromEnd(glob)) {
        this.fail('a glob for a class', 'numbers count from the end in names alone', start)
      }
      return [glob, writeGlob(glob)]
    }
    const text = this.rawValue(opening)
    if (!text) this.fail(`a value for ${field}`, EXAMPLES[field], start)
    const refuse = (expected: string, hint = EXAMPLES[field]): never => this.fail(expected, hint, start)
    switch (field) {
      case 'shape':
        return shapeOf(text) ?? refuse('a shape')
      case 'dtype': {
        const name = this.dtypes[text] ?? this.dtypes[text.replace(/^torch\./, '').toLowerCase()]
        return name === undefined ? refuse('a dtype', 'bfloat16, bf16, float32, F32, int64') : [name, text]
      }
      case 'kind':
        return KINDS.includes(text) ? [text, text] : refuse(`one of ${KINDS.join(', ')}`, '')
      case 'device':
        return /^[\p{L}_][\p{L}\p{N}_]*(:[0-9]+)?$/u.test(text) ? [text, text] : refuse('a device')
      case 'encoding':
        return [text, text]
      case 'bpw':
        return /^[0-9]{1,9}(\.[0-9]{1,9})?$/.test(text) ? [Number(text), text] : refuse('a number')
      default:
        return this.number(text, field, refuse)
    }
  }

  number(text: string, field: string, refuse: (expected: string, hint?: string) => never): [Value, string] {
    const sized = field === 'numel' || field === 'nbytes'
    const expected = sized ? 'a size' : 'a whole number'
    const hint = sized ? '1500000, 1500K, 1.5M (decimal), 2KiB, 1MiB, 3GiB (binary)' : EXAMPLES[field]
    const found = Array.from(text).length <= 40 ? /^([0-9]+(?:_[0-9]+)*)(\.[0-9]+)? *([A-Za-z]*)$/.exec(text) : null
    if (!found) return refuse(expected, hint)
    const [, whole, fraction = '', unit] = found
    if (!Object.hasOwn(UNITS, unit) || (unit && !sized)) return refuse(expected, hint)
    const decimals = fraction.slice(1)
    const scale = 10n ** BigInt(decimals.length)
    const value = BigInt(whole.replaceAll('_', '') + decimals) * UNITS[unit]
    if (value % scale) {
      return refuse(expected, `${text} is no whole number of ${field === 'nbytes' ? 'bytes' : 'elements'}`)
    }
    return [value / scale, text]
  }

  rawValue(opening: number): string {
    const quote = this.peek()
    if (quote === "'" || quote === '"') {
      const stop = this.chars.indexOf(quote, this.at + 1)
      if (stop < 0) {
        this.fail(`a closing ${quote}`, `the quote at column ${this.at + 1} is not closed`, this.chars.length)
      }
      const text = this.chars.slice(this.at + 1, stop).join('')
      this.at = stop + 1
      return strip(text)
    }
    // A shape may be written as the table prints it, with brackets of its own.
    const inner = quote === '[' ? this.chars.indexOf(']', this.at) + 1 : this.at
    const stop = this.chars.indexOf(']', inner)
    if (stop < 0 || (quote === '[' && !inner)) {
      this.fail('`]`', `the bracket at column ${opening + 1} is not closed`, this.chars.length)
    }
    const text = this.chars.slice(this.at, stop).join('')
    this.at = stop
    return strip(text)
  }
}

/** As Python's `str.strip`. */
function strip(text: string): string {
  const chars = Array.from(text)
  while (chars.length && isSpace(chars[0])) chars.shift()
  while (chars.length && isSpace(chars[chars.length - 1])) chars.pop()
  return chars.join('')
}

function shapeOf(text: string): [Value, string] | null {
  if (text === 'lazy') return [null, text]
  const closing: Record<string, string> = { '(': ')', '[': ']' }
  const listed = Object.hasOwn(closing, text[0]) && text.at(-1) === closing[text[0]]
  const inner = listed ? strip(text.slice(1, -1)) : text
  if (listed && !inner) return [[], '()']
  const sizes = inner.split(/[,x\u00d7]/).map(strip)
  if (listed && sizes.length > 1 && !sizes.at(-1)) sizes.pop() // (64,) as Python writes it
  if (!sizes.every((size) => size === '*' || /^[0-9]{1,18}$/.test(size))) return null
  const value = sizes.map((size) => (size === '*' ? null : BigInt(size)))
  return [value, value.map((size) => (size === null ? '*' : String(size))).join('x')]
}

// --- tree → text ----------------------------------------------------------------------------------

/** The text of a tree, with the fewest parentheses. */
export function write(node: Node): string {
  switch (node.kind) {
    case 'union':
      return node.terms.map(write).join(' | ')
    case 'intersection':
      return node.terms.map(asTerm).join(' & ')
    case 'complement':
      return node.term.kind === 'intersection' ? `~(${write(node.term)})` : `~${asTerm(node.term)}`
    default: {
      const { pattern } = node
      const head = pattern === null ? '' : pattern.kind === 'glob' ? writeGlob(pattern) : `/${pattern.pattern}/`
      return head + node.conditions.map(writeCondition).join('')
    }
  }
}

function asTerm(node: Node): string {
  return node.kind === 'union' ? `(${write(node)})` : write(node)
}

export function writeCondition(each: Condition | Word): string {
  return each.kind === 'word' ? `:${each.word}` : `[${each.field}${each.op}${each.text}]`
}
