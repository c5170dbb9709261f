/** Layers down, roles across, a statistic as colour. Cells are drawn on a canvas, labels are text. */
import { coloursOf, type Colours, inkOn } from '../colour'
import { fill, h, onWidth } from '../dom'
import { number, plural } from '../format'
import type { Stack } from '../model'
import type { State } from '../state'
import { together } from '../statistics'
import { groupTip, hideTip, tensorTip } from '../tip'

const MOST_LAYERS = 1200 // more are put together, so that the canvas stays within what browsers draw

interface Grid {
  stack: Stack
  /** Layers of each row of the picture: one, or several. */
  bands: number[][]
  cellWidth: number
  cellHeight: number
  canvas: HTMLCanvasElement
  cursor: HTMLElement
  at: { row: number; column: number } | null
}

export class HeatMap {
  #grids: Grid[] = []

  constructor(
    readonly state: State,
    readonly root: HTMLElement,
  ) {
    this.build()
    onWidth(root, () => this.build())
    state.listen((change) => {
      if (change === 'tensor') this.mark()
      else this.draw()
    })
  }

  build(): void {
    const { stacks } = this.state.model
    this.#grids = []
    fill(this.root, ...stacks.map((stack) => this.stackBlock(stack)))
    this.draw()
  }

  private stackBlock(stack: Stack): HTMLElement {
    const wide = stack.numbered
    const available = Math.max(320, this.root.clientWidth || 1100)
    const longest = Math.max(...stack.layers.map((layer) => layer.length), 1)
    const labelWidth = Math.min(wide ? 150 : 320, 18 + longest * 7)
    const cellWidth = Math.max(13, Math.min(wide ? 132 : 120, Math.floor((available - labelWidth - 2) / stack.roles.length)))
    const per = Math.ceil(stack.layers.length / MOST_LAYERS)
    const bands: number[][] = []
    for (let i = 0; i < stack.layers.length; i += per) {
      bands.push(stack.layers.map((_, layer) => layer).slice(i, i + per))
    }
    const n = bands.length
    const cellHeight = n <= 40 ? 22 : n <= 64 ? 17 : n <= 130 ? 11 : n <= 300 ? 6 : 4
    const word = Math.max(...stack.roles.flatMap((role) => role.split(/[._]/)).map((piece) => piece.length + 1))
    const stacked = cellWidth >= Math.max(46, word * 6.4)
    const canvas = h('canvas', {
      tabindex: 0,
      role: 'application',
      'aria-label': `${stack.title || 'other tensors'}: ${plural(n, 'layer')} by ${plural(stack.roles.length, 'role')}. Arrow keys move, Enter opens the tensor.`,
    })
    const [width, height] = [cellWidth * stack.roles.length, cellHeight * n]
    canvas.width = Math.round(width * devicePixelRatio)
    canvas.height = Math.round(height * devicePixelRatio)
    canvas.style.width = `${width}px`
    canvas.style.height = `${height}px`
    const cursor = h('div', { class: 'cursor', hidden: true })
    const grid: Grid = { stack, bands, cellWidth, cellHeight, canvas, cursor, at: null }
    this.#grids.push(grid)
    this.bind(grid)

    const step = Math.max(1, Math.ceil(13 / cellHeight))
    const layers = h('div', { class: 'layer-labels', role: 'list' })
    layers.style.width = `${labelWidth}px`
    layers.style.height = `${height}px`
    bands.forEach((band, i) => {
      if (i % step) return
      const first = stack.layers[band[0]]
      const last = stack.layers[band.at(-1)!]
      const label = h('span', { role: 'listitem' }, band.length > 1 ? `${first}–${last}` : first || '(top level)')
      label.style.top = `${i * cellHeight}px`
      label.style.height = `${cellHeight * step}px`
      label.style.lineHeight = `${Math.max(cellHeight, 13)}px`
      layers.append(label)
    })
    const roles = h('div', { class: stacked ? 'role-labels stacked' : 'role-labels upright', role: 'list' })
    roles.style.marginLeft = `${labelWidth}px`
    roles.style.width = `${width}px`
    for (const role of stack.roles) {
      const label = h('span', { role: 'listitem', title: role }, ...(stacked ? rolePieces(role) : [role]))
      label.style.width = `${cellWidth}px`
      roles.append(label)
    }
    const frame = h('div', { class: 'cells' }, canvas, cursor)
    return h(
      'div',
      { class: 'stack' },
      h(
        'h3',
        {},
        stack.numbered ? h('code', {}, stack.title || '(top level)') : stacksTitle(this.state),
        h('span', { class: 'dim' }, stack.numbered ? `${plural(stack.layers.length, 'layer')} × ${plural(stack.roles.length, 'role')}` : plural([...stack.cells.values()].reduce((sum, rows) => sum + rows.length, 0), 'tensor')),
      ),
      h('div', { class: 'scroll' }, roles, h('div', { class: 'lattice' }, layers, frame)),
    )
  }

  rowsAt(grid: Grid, row: number, column: number): number[] {
    return grid.bands[row].flatMap((layer) => grid.stack.cells.get(layer * grid.stack.roles.length + column) ?? [])
  }

  draw(): void {
    const { state } = this
    for (const grid of this.#grids) {
      const { stack, bands, cellWidth, cellHeight, canvas } = grid
      const context = canvas.getContext('2d')!
      context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0)
      context.clearRect(0, 0, canvas.width, canvas.height)
      const style = getComputedStyle(document.documentElement)
      const empty = style.getPropertyValue('--empty')
      const accent = style.getPropertyValue('--accent')
      const gap = cellHeight > 8 ? 1 : 0
      const numbers = cellWidth >= 46 && cellHeight >= 15
      context.font = `10.5px ${style.getPropertyValue('--mono')}`
      context.textAlign = 'center'
      context.textBaseline = 'middle'
      for (let column = 0; column < stack.roles.length; column++) {
        const values = bands.map((_, row) => {
          const rows = this.rowsAt(grid, row, column)
          return rows.length ? together(state.statistic, rows, state.model.numel) : NaN
        })
        const colours: Colours = state.perRole ? coloursOf(state.statistic, state.log, values) : state.colours
        bands.forEach((_, row) => {
          const rows = this.rowsAt(grid, row, column)
          if (!rows.length) return
          const colour = colours(values[row])
          const [x, y] = [column * cellWidth, row * cellHeight]
          context.globalAlpha = rows.some((each) => state.hit(each)) ? 1 : 0.12
          context.fillStyle = colour ?? empty
          context.fillRect(x, y, cellWidth - gap, cellHeight - gap)
          if (numbers) {
            context.fillStyle = colour ? inkOn(colour) : style.getPropertyValue('--dim')
            context.globalAlpha *= 0.85
            context.fillText(short(inCell(state, values[row]), cellWidth), x + (cellWidth - gap) / 2, y + cellHeight / 2)
          }
          const flagged = rows.some((each) => state.model.flagged.has(each))
          if (flagged) {
            const size = Math.max(4, Math.min(8, cellHeight - 2))
            context.globalAlpha = 1
            context.fillStyle = accent
            context.beginPath()
            context.moveTo(x + cellWidth - gap, y)
            context.lineTo(x + cellWidth - gap - size, y)
            context.lineTo(x + cellWidth - gap, y + size)
            context.fill()
          }
        })
      }
      context.globalAlpha = 1
      if (state.model.over) canvas.dataset.step = String(state.model.over.step)
      canvas.dataset.drawn = `${state.statistic.key} ${state.perRole ? 'role' : 'all'} ${state.log ? 'log' : 'linear'}`
    }
    this.mark()
  }

  /** The cell of the open tensor. */
  mark(): void {
    const { open, model } = this.state
    for (const grid of this.#grids) {
      if (open === null || model.stacks[model.spots[open].stack] !== grid.stack) {
        grid.cursor.hidden = true
        continue
      }
      const { layer, role } = model.spots[open]
      this.moveTo(grid, grid.bands.findIndex((band) => band.includes(layer)), role)
    }
  }

  private moveTo(grid: Grid, row: number, column: number): void {
    grid.at = { row, column }
    grid.cursor.hidden = false
    grid.cursor.style.left = `${column * grid.cellWidth}px`
    grid.cursor.style.top = `${row * grid.cellHeight}px`
    grid.cursor.style.width = `${grid.cellWidth - 1}px`
    grid.cursor.style.height = `${grid.cellHeight - (grid.cellHeight > 8 ? 1 : 0)}px`
  }

  private bind(grid: Grid): void {
    const { canvas } = grid
    const cell = (event: MouseEvent) => {
      const box = canvas.getBoundingClientRect()
      const column = Math.floor((event.clientX - box.left) / grid.cellWidth)
      const row = Math.floor((event.clientY - box.top) / grid.cellHeight)
      const inside = row >= 0 && row < grid.bands.length && column >= 0 && column < grid.stack.roles.length
      return inside && this.rowsAt(grid, row, column).length ? { row, column } : null
    }
    canvas.addEventListener('mousemove', (event) => {
      const at = cell(event)
      canvas.style.cursor = at ? 'pointer' : 'default'
      if (at) this.hover(grid, at.row, at.column, event.clientX, event.clientY)
      else hideTip()
    })
    canvas.addEventListener('mouseleave', () => {
      hideTip()
      this.mark()
    })
    canvas.addEventListener('click', (event) => {
      const at = cell(event)
      if (at) this.openCell(grid, at.row, at.column)
    })
    canvas.addEventListener('blur', hideTip)
    canvas.addEventListener('keydown', (event) => {
      const moves: Record<string, [number, number]> = {
        ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      }
      const move = moves[event.key]
      const at = grid.at ?? { row: 0, column: -1 }
      if (move) {
        event.preventDefault()
        let [row, column] = [at.row, at.column]
        do {
          row += move[0]
          column += move[1]
          if (row < 0 || column < 0 || row >= grid.bands.length || column >= grid.stack.roles.length) return
        } while (!this.rowsAt(grid, row, column).length)
        const box = canvas.getBoundingClientRect()
        this.hover(grid, row, column, box.left + (column + 1) * grid.cellWidth, box.top + (row + 1) * grid.cellHeight)
      } else if (event.key === 'Enter' && grid.at && grid.at.column >= 0) {
        event.preventDefault()
        this.openCell(grid, grid.at.row, grid.at.column)
      }
    })
  }

  private openCell(grid: Grid, row: number, column: number): void {
    const rows = this.rowsAt(grid, row, column)
    const marked = rows.find((each) => this.state.model.flagged.has(each))
    this.state.show(marked ?? rows[0])
  }

  private hover(grid: Grid, row: number, column: number, x: number, y: number): void {
    const { state } = this
    this.moveTo(grid, row, column)
    const rows = this.rowsAt(grid, row, column)
    if (rows.length === 1) {
      tensorTip(state, rows[0], x, y)
      return
    }
    const values = rows.map((each) => state.statistic.value(each)).filter((value) => !Number.isNaN(value))
    const band = grid.bands[row]
    const layer = band.length > 1 ? `${grid.stack.layers[band[0]]}–${grid.stack.layers[band.at(-1)!]}` : grid.stack.layers[band[0]]
    groupTip(
      [grid.stack.title, layer, grid.stack.roles[column]].filter(Boolean).join('.'),
      [plural(rows.length, 'tensor')],
      [
        [`${state.statistic.label}, ${state.statistic.together}`, state.statistic.format(together(state.statistic, rows, state.model.numel))],
        ...(state.statistic.words
          ? []
          : ([
              ['least', state.statistic.format(values.length ? Math.min(...values) : NaN)],
              ['greatest', state.statistic.format(values.length ? Math.max(...values) : NaN)],
            ] as [string, string][])),
      ],
      x,
      y,
    )
  }
}

/** A role in two or three lines: its components, the last one strongest. */
function rolePieces(role: string): HTMLElement[] {
  const parts = role.split('.')
  const lines = parts.length > 3 ? [parts.slice(0, -2).join('.'), ...parts.slice(-2)] : parts
  return lines.map((line, i) =>
    h('b', { class: i === lines.length - 1 ? 'leaf' : i === lines.length - 2 ? 'stem' : 'branch' }, ...breakable(line)),
  )
}

/** A text that may go on in the next line after each underscore. */
function breakable(text: string): (string | HTMLElement)[] {
  return text.split(/(?<=_)/).flatMap((piece, i) => (i ? [h('wbr'), piece] : [piece]))
}

function stacksTitle(state: State): string {
  return state.model.stacks.length > 1 ? 'Outside the layers' : 'Modules'
}

/** A value in three digits, so that those of a column stand below each other. */
function inCell({ statistic }: State, value: number): string {
  if (statistic.format !== number || !Number.isFinite(value) || value === 0) return statistic.format(value)
  const size = Math.abs(value)
  const text = size >= 1e-3 && size < 1e4 ? size.toPrecision(3) : size.toExponential(1)
  return (value < 0 ? '−' : '') + (size >= 1000 && size < 1e4 ? size.toFixed(0) : text)
}

/** A number where a cell has room for it. */
function short(text: string, width: number): string {
  return text.length * 6.5 > width - 4 ? '' : text
}
