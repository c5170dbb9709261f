/**
 * Regular expressions as Python's `re` means them, matched without going back on a choice.
 *
 * The page takes what Python and JavaScript would agree on: characters, classes, groups, alternatives, repeats and the
 * ends of a name. Anything else is named as unsupported. A pattern becomes a nondeterministic automaton that reads each
 * character once for all choices together (Thompson 1968), so no pattern hangs; many names together have a time limit.
 */
import { SelectorError } from './errors'

type Test = (char: string) => boolean
type Tree =
  | { kind: 'char'; test: Test }
  | { kind: 'end' | 'start' | 'close' }
  | { kind: 'all'; items: Tree[] }
  | { kind: 'any'; items: Tree[] }
  | { kind: 'repeat'; item: Tree; least: number; most: number }

const STATES = 20_000
/** Milliseconds that the names of a table may take together. */
export const TIME_LIMIT = 2000

const DIGIT: Test = (char) => /^\p{Nd}$/u.test(char)
const WORD: Test = (char) => /^[\p{L}\p{N}_]$/u.test(char)
const SPACE: Test = (char) => /^[\s\x1c-\x1f\x85]$/u.test(char) && char !== '\ufeff'
const not =
  (test: Test): Test =>
  (char) =>
    !test(char)
const CLASSES: Record<string, Test> = { d: DIGIT, D: not(DIGIT), w: WORD, W: not(WORD), s: SPACE, S: not(SPACE) }
const CONTROLS: Record<string, string> = { n: '\n', r: '\r', t: '\t', f: '\f', v: '\v', a: '\x07' }

class Reader {
  readonly chars: string[]
  at = 0

  constructor(
    pattern: string,
    readonly column: number,
  ) {
    this.chars = Array.from(pattern)
  }

  peek(ahead = 0): string {
    return this.chars[this.at + ahead] ?? ''
  }

  fail(what: string, at = this.at): never {
    throw new SelectorError(what, this.column + Math.min(at, this.chars.length) + 1, 'a regular expression', '')
  }

  unsupported(what: string, at = this.at): never {
    throw new SelectorError(
      `${what} is not supported in the page`,
      this.column + at + 1,
      'a regular expression that Python and JavaScript agree on',
      'torchparams itself takes it: -s on the command line',
    )
  }

  whole(): Tree {
    const tree = this.alternatives(0)
    if (this.peek()) this.fail('unbalanced parenthesis')
    return tree
  }

  alternatives(depth: number): Tree {
    if (depth > 100) this.fail('nested too deeply')
    const items = [this.sequence(depth)]
    while (this.peek() === '|') {
      this.at += 1
      items.push(this.sequence(depth))
    }
    return items.length > 1 ? { kind: 'any', items } : items[0]
  }

  sequence(depth: number): Tree {
    const items: Tree[] = []
    for (let char = this.peek(); char && char !== '|' && char !== ')'; char = this.peek()) {
      items.push(this.repeated(depth))
    }
    return { kind: 'all', items }
  }

  repeated(depth: number): Tree {
    const start = this.at
    if (this.quantifier()) this.fail('nothing to repeat', start)
    let item = this.atom(depth)
    const place = this.at
    const times = this.quantifier()
    if (times) {
      if (['start', 'end', 'close'].includes(item.kind)) this.unsupported('a repeat of an anchor', place)
      if (this.peek() === '+') this.unsupported('a possessive repeat')
      if (this.peek() === '?') this.at += 1 // which of several matches is found first is nobody's concern here
      item = { kind: 'repeat', item, least: times[0], most: times[1] }
      const again = this.at
      if (this.quantifier()) this.fail('multiple repeat', again)
    }
    return item
  }

  /** Least and most times; null where none stands here. */
  quantifier(): [number, number] | null {
    const char = this.peek()
    if (char === '*' || char === '+' || char === '?') {
      this.at += 1
      return char === '*' ? [0, Infinity] : char === '+' ? [1, Infinity] : [0, 1]
    }
    if (char !== '{') return null
    const found = /^\{([0-9]*)(,?)([0-9]*)\}/.exec(this.chars.slice(this.at, this.at + 50).join(''))
    if (!found || (!found[1] && !found[2])) return null // characters that stand for themselves
    const [whole, first, comma, last] = found
    const least = first ? Number(first) : 0
    const most = last ? Number(last) : comma ? Infinity : least
    if (most < least) this.fail('min repeat greater than max repeat', this.at + 1)
    this.at += whole.length
    return [least, most]
  }

  atom(depth: number): Tree {
    const char = this.peek()
    const at = this.at
    this.at += 1
    switch (char) {
      case '(':
        return this.group(depth, at)
      case '[':
        return { kind: 'char', test: this.set(at) }
      case '.':
        return { kind: 'char', test: (c) => c !== '\n' }
      case '^':
        return { kind: 'start' }
      case '$':
        return { kind: 'end' }
      case '\\':
        return this.escape(at)
      default:
        return { kind: 'char', test: (c) => c === char }
    }
  }

  group(depth: number, opening: number): Tree {
    if (this.peek() === '?') {
      const rest = this.chars.slice(this.at + 1, this.at + 120).join('')
      const name = /^P<([\p{L}_][\p{L}\p{N}_]*)>/u.exec(rest)
      if (rest.startsWith(':')) this.at += 2
      else if (name) this.at += 1 + Array.from(name[0]).length
      else if (/^<?[=!]/.test(rest)) this.unsupported('a look around', opening)
      else if (rest.startsWith('>')) this.unsupported('an atomic group', opening)
      else if (rest.startsWith('P=')) this.unsupported('a reference to a group', opening)
      else if (rest.startsWith('#')) this.unsupported('a comment', opening)
      else if (/^[aiLmsux-]/.test(rest)) this.unsupported('a flag', opening)
      else this.fail('unknown extension of a group', this.at)
    }
    const tree = this.alternatives(depth + 1)
    if (this.peek() !== ')') this.fail('missing ), unterminated subpattern', opening)
    this.at += 1
    return tree
  }

  /** The character behind a backslash as itself; null where it stands for something else. */
  character(at: number): string | null {
    const char = this.peek()
    if (!char) this.fail('bad escape (end of pattern)', at)
    if (char === 'x' || char === 'u' || char === 'U') {
      const digits = { x: 2, u: 4, U: 8 }[char]
      const hex = this.chars.slice(this.at + 1, this.at + 1 + digits).join('')
      if (!/^[0-9a-fA-F]+$/.test(hex) || hex.length < digits || parseInt(hex, 16) > 0x10ffff) {
        this.fail(`incomplete escape \\${char}${hex}`, at)
      }
      this.at += 1 + digits
      return String.fromCodePoint(parseInt(hex, 16))
    }
    if (Object.hasOwn(CONTROLS, char)) {
      this.at += 1
      return CONTROLS[char]
    }
    if (/[0-9]/.test(char)) this.unsupported('a number behind a backslash', at)
    if (/[A-Za-z]/.test(char)) return null
    this.at += 1
    return char
  }

  escape(at: number): Tree {
    const char = this.character(at)
    if (char !== null) return { kind: 'char', test: (c) => c === char }
    const letter = this.peek()
    this.at += 1
    if (Object.hasOwn(CLASSES, letter)) return { kind: 'char', test: CLASSES[letter] }
    if (letter === 'A') return { kind: 'start' }
    if (letter === 'Z') return { kind: 'close' }
    if ('bBN'.includes(letter)) this.unsupported(`\\${letter}`, at)
    return this.fail(`bad escape \\${letter}`, at)
  }

  set(opening: number): Test {
    const negated = this.peek() === '^'
    if (negated) this.at += 1
    const tests: Test[] = []
    for (let first = true; ; first = false) {
      const char = this.peek()
      if (!char) this.fail('unterminated character set', opening)
      if (char === ']' && !first) break
      const low = this.member()
      if (this.peek() === '-' && this.peek(1) && this.peek(1) !== ']') {
        const at = this.at
        this.at += 1
        const high = this.member()
        if (typeof low !== 'string' || typeof high !== 'string') this.fail('bad character range', at)
        const [a, b] = [low.codePointAt(0)!, high.codePointAt(0)!]
        if (a > b) this.fail('bad character range', at)
        tests.push((c) => a <= c.codePointAt(0)! && c.codePointAt(0)! <= b)
      } else {
        tests.push(typeof low === 'string' ? (c) => c === low : low)
      }
    }
    this.at += 1
    return negated ? (char) => !tests.some((test) => test(char)) : (char) => tests.some((test) => test(char))
  }

  member(): string | Test {
    const at = this.at
    const char = this.peek()
    if (char === '[') this.unsupported('[ within a set, without a backslash', at)
    if ('-&|~'.includes(char) && this.peek(1) === char) this.unsupported('a set operation', at)
    this.at += 1
    if (char !== '\\') return char
    const escaped = this.character(at)
    if (escaped !== null) return escaped
    const letter = this.peek()
    this.at += 1
    if (Object.hasOwn(CLASSES, letter)) return CLASSES[letter]
    if (letter === 'b') return '\b'
    return this.fail(`bad escape \\${letter}`, at)
  }
}

// --- the automaton --------------------------------------------------------------------------------

interface State {
  /** Reads a character; null for a state that is passed without one. */
  test: Test | null
  /** Passed only at the start or the end of the name; `close` is the very end. */
  anchor: 'start' | 'end' | 'close' | null
  next: number[]
}

class Automaton {
  readonly states: State[] = []
  readonly first: number
  readonly last: number

  constructor(
    tree: Tree,
    readonly column: number,
  ) {
    this.last = this.state(null)
    this.first = this.add(tree, this.last)
  }

  state(test: Test | null, next: number[] = [], anchor: State['anchor'] = null): number {
    if (this.states.length >= STATES) {
      throw new SelectorError('the repeats are too large for the page', this.column + 1, 'a smaller pattern', '')
    }
    return this.states.push({ test, anchor, next }) - 1
  }

  /** Adds what reads `tree` and goes on at `next`; gives its first state. */
  add(tree: Tree, next: number): number {
    switch (tree.kind) {
      case 'char':
        return this.state(tree.test, [next])
      case 'start':
      case 'end':
      case 'close':
        return this.state(null, [next], tree.kind)
      case 'all':
        return tree.items.reduceRight((after, item) => this.add(item, after), next)
      case 'any':
        return this.state(null, tree.items.map((item) => this.add(item, next)))
      case 'repeat': {
        let after = next
        if (tree.most === Infinity) {
          after = this.state(null, [next])
          this.states[after].next.push(this.add(tree.item, after))
        } else {
          for (let i = tree.least; i < tree.most; i++) after = this.state(null, [next, this.add(tree.item, after)])
        }
        for (let i = 0; i < tree.least; i++) after = this.add(tree.item, after)
        return after
      }
    }
  }

  matches(name: string): boolean {
    const chars = Array.from(name)
    let here = this.closure([this.first], chars, 0)
    for (let at = 0; at < chars.length; at++) {
      const reached: number[] = []
      for (const i of here) {
        const { test, next } = this.states[i]
        if (test?.(chars[at])) reached.push(...next)
      }
      if (!reached.length) return false
      here = this.closure(reached, chars, at + 1)
    }
    return here.has(this.last)
  }

  /** The states, and those that are reached from them without reading a character. */
  closure(from: number[], chars: string[], at: number): Set<number> {
    const found = new Set<number>()
    const todo = [...from]
    for (let i = todo.pop(); i !== undefined; i = todo.pop()) {
      if (found.has(i)) continue
      const { test, anchor, next } = this.states[i]
      if (anchor === 'start' && at > 0) continue
      if (anchor === 'close' && at < chars.length) continue
      // As in Python, `$` also stands before a newline at the end.
      if (anchor === 'end' && at < chars.length && !(at === chars.length - 1 && chars[at] === '\n')) continue
      found.add(i)
      if (test === null) todo.push(...next)
    }
    return found
  }
}

/** A function that tells whether the pattern matches a whole name. `column` is where it stands, for errors. */
export function compileRegex(pattern: string, column: number): (name: string) => boolean {
  const automaton = new Automaton(new Reader(pattern, column).whole(), column)
  return (name) => automaton.matches(name)
}
