/** The modules as an icicle: as high as their bytes or elements, coloured by the statistic. A click goes in. */
import { hierarchy, type HierarchyRectangularNode, partition } from 'd3-hierarchy'
import { inkOn } from '../colour'
import { choice, fill, h, onWidth, s, visible } from '../dom'
import { bytes, human, plural } from '../format'
import { naturally } from '../model'
import type { State } from '../state'
import { together } from '../statistics'
import { groupTip, hideTip, tensorTip } from '../tip'

interface Part {
  name: string
  path: string
  children?: Part[]
  /** The tensor, of a leaf. */
  row?: number
}
type Place = HierarchyRectangularNode<Part>

const [MOST, FLAT] = [620, 150] // pixels of height at most, and at least
const LEAST = 0.7 // pixels below which nothing is drawn

export class Icicle {
  #by: 'nbytes' | 'numel' = 'nbytes'
  #root!: Place
  #focus!: Place
  readonly #crumbs = h('nav', { class: 'crumbs', 'aria-label': 'Path' })
  readonly #svg = s('svg', { class: 'icicle', role: 'tree', 'aria-label': 'Modules by size' })

  constructor(
    readonly state: State,
    readonly root: HTMLElement,
  ) {
    const by = choice('Size by', [['nbytes', 'bytes'], ['numel', 'elements']], this.#by, (value) => {
      this.#by = value
      this.measure(this.#focus.data.path)
      this.draw()
    })
    fill(root, h('div', { class: 'view-tools' }, this.#crumbs, by), this.#svg as unknown as HTMLElement)
    this.measure('')
    this.draw()
    onWidth(root, () => this.draw())
    state.listen((change) => change !== 'tensor' && this.draw())
  }

  private measure(focus: string): void {
    const size = this.state.model[this.#by]
    const made = hierarchy(treeOf(this.state)).sum((part) => (part.row === undefined ? 0 : Math.max(size[part.row], 1e-9)))
    this.#root = partition<Part>()(made)
    this.#focus = this.#root.find((node) => node.data.path === focus && node.data.row === undefined) ?? this.#root
  }

  private go(node: Place): void {
    if (node.data.row !== undefined) {
      this.state.show(node.data.row)
      return
    }
    this.#focus = node
    this.draw()
    hideTip()
  }

  draw(): void {
    const width = Math.max(this.root.clientWidth, 300)
    const { state } = this
    const focus = this.#focus
    const deepest = focus.height + 1
    const column = width / Math.min(deepest, Math.max(3, Math.floor(width / 110)))
    const tall = Math.max(FLAT, Math.min(MOST, 26 * focus.leaves().length))
    const scale = tall / (focus.x1 - focus.x0)
    this.#svg.setAttribute('viewBox', `0 0 ${width} ${tall}`)
    this.#svg.setAttribute('width', String(width))
    this.#svg.setAttribute('height', String(tall))
    const parts: SVGElement[] = []
    const visit = (node: Place) => {
      const y = (node.x0 - focus.x0) * scale
      const height = (node.x1 - node.x0) * scale
      const x = (node.depth - focus.depth) * column
      if (height < LEAST || x >= width) return
      parts.push(this.block(node, x, y, node.children ? column : Math.max(column, width - x), height))
      node.children?.forEach(visit)
    }
    visit(focus)
    this.#svg.replaceChildren(...parts)
    this.#svg.dataset.drawn = state.statistic.key
    if (state.model.over) this.#svg.dataset.step = String(state.model.over.step)
    const path: Place[] = []
    for (let node: Place | null = focus; node; node = node.parent) path.unshift(node)
    fill(this.#crumbs, ...path.flatMap((node, i) => [
      i ? h('span', { class: 'dim' }, '›') : null,
      h('button', { type: 'button', 'aria-current': node === focus ? 'page' : null, click: () => this.go(node) }, node.data.name || 'all'),
    ]))
  }

  private block(node: Place, x: number, y: number, width: number, height: number): SVGElement {
    const { state } = this
    const rows = leavesOf(node)
    const hit = state.mask === null || rows.some((row) => state.hit(row))
    const colour = state.colours(together(state.statistic, rows, state.model.numel))
    const flagged = height > 5 && rows.some((row) => state.model.flagged.has(row))
    const size = bytes(sumOf(state, rows, 'nbytes'))
    const label = node.data.name || state.model.source.label
    const ink = colour ? inkOn(colour) : 'var(--text)'
    const room = Math.floor((width - 12) / 6.7)
    const shown = height >= 11 ? clip(label, room) : ''
    const group = s(
      'g',
      {
        class: hit ? 'block' : 'block dimmed',
        role: 'treeitem',
        tabindex: height >= 6 ? 0 : null,
        'aria-label': `${label}, ${size}, ${state.statistic.label} ${state.statistic.format(together(state.statistic, rows, state.model.numel))}`,
        transform: `translate(${x.toFixed(1)},${y.toFixed(2)})`,
        click: () => this.go(node === this.#focus && node.parent ? node.parent : node),
        keydown: (event: KeyboardEvent) => {
          if (event.key === 'Enter' || event.key === ' ') this.go(node)
          else if ((event.key === 'Backspace' || event.key === 'ArrowLeft') && this.#focus.parent) this.go(this.#focus.parent)
          else if (event.key === 'ArrowDown' || event.key === 'ArrowUp') {
            const all = [...this.#svg.querySelectorAll<SVGGElement>('g[tabindex]')]
            all[all.indexOf(group) + (event.key === 'ArrowDown' ? 1 : -1)]?.focus()
          } else return
          event.preventDefault()
        },
        mousemove: (event: MouseEvent) => this.hover(node, rows, event.clientX, event.clientY),
        mouseleave: hideTip,
      },
      s('rect', { width: Math.max(width - 1, 0.5), height: Math.max(height - (height > 3 ? 1 : 0.2), 0.5), fill: colour ?? 'var(--empty)', rx: height > 8 ? 2 : 0 }),
      shown ? s('text', { x: 6, y: Math.min(height / 2 + 3.8, 16), fill: ink }, shown) : null,
      shown && room - label.length > size.length + 3
        ? s('text', { x: width - 8, y: Math.min(height / 2 + 3.8, 16), fill: ink, 'text-anchor': 'end', class: 'size' }, size)
        : null,
      flagged && node.data.row !== undefined ? s('path', { class: 'flag', d: `M${width - 1},0h-7l7,7z` }) : null,
    ) as SVGGElement
    return group
  }

  private hover(node: Place, rows: number[], x: number, y: number): void {
    const { state } = this
    if (node.data.row !== undefined) {
      tensorTip(state, node.data.row, x, y)
      return
    }
    groupTip(
      node.data.path || state.model.source.label,
      [plural(rows.length, 'tensor')],
      [
        ['elements', human(sumOf(state, rows, 'numel'))],
        ['bytes', bytes(sumOf(state, rows, 'nbytes'))],
        [`${state.statistic.label}, ${state.statistic.together}`, state.statistic.format(together(state.statistic, rows, state.model.numel))],
      ],
      x,
      y,
    )
  }
}

function sumOf(state: State, rows: number[], key: 'nbytes' | 'numel'): number {
  return rows.reduce((sum, row) => sum + state.model[key][row], 0)
}

const LEAVES = new WeakMap<Place, number[]>()

function leavesOf(node: Place): number[] {
  let found = LEAVES.get(node)
  if (!found) LEAVES.set(node, (found = node.leaves().flatMap((leaf) => (leaf.data.row === undefined ? [] : [leaf.data.row]))))
  return found
}

/** The tree of modules; one that has a single child is put together with it. */
function treeOf(state: State): Part {
  interface Branch {
    parts: Map<string, Branch>
    row?: number
  }
  const top: Branch = { parts: new Map() }
  state.model.names.forEach((name, row) => {
    let at = top
    for (const part of name.split('.')) {
      let next = at.parts.get(part)
      if (!next) at.parts.set(part, (next = { parts: new Map() }))
      at = next
    }
    // A name that is a module too: the tensor is a part without a name of its own.
    if (at.row === undefined) at.row = row
    else at.parts.set(`\0${row}`, { parts: new Map(), row })
  })
  const made = (name: string, path: string, branch: Branch, merge: boolean): Part => {
    if (branch.row !== undefined && branch.parts.size) {
      branch.parts.set('', { parts: new Map(), row: branch.row })
      branch.row = undefined
    }
    if (branch.row !== undefined) return { name, path, row: branch.row }
    if (merge && branch.parts.size === 1) {
      const [[key, only]] = branch.parts
      return made(`${name}.${key}`, `${path}.${key}`, only, true)
    }
    const keys = [...branch.parts].sort(([a], [b]) => (/^\d/.test(a) && /^\d/.test(b) ? naturally(a, b) : 0))
    return { name, path, children: keys.map(([key, child]) => made(key, path ? `${path}.${key}` : key, child, true)) }
  }
  return made('', '', top, false)
}

function clip(text: string, room: number): string {
  const seen = visible(text)
  return room < 3 ? '' : seen.length <= room ? seen : `${seen.slice(0, room - 1)}…`
}
